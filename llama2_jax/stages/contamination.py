"""Which samples of the benchmarks are in a training corpus, and whether the model's scores show it (paper p75-76; recipe I.3)."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils.epath import Path
from tqdm import tqdm

from llama2_jax.checkpoints.load import open_language_model, tokenizer_of
from llama2_jax.config import UserError
from llama2_jax.data import sources
from llama2_jax.data.mixing import parse_mixture
from llama2_jax.evals.contamination import Spans, as_rows, markdown, verbalise
from llama2_jax.evals.files import Files
from llama2_jax.evals.measure import spread
from llama2_jax.evals.task import Example
from llama2_jax.evals.tasks import TASKS, expand
from llama2_jax.files import make_directory, read_json, write_atomically
from llama2_jax.runtime import is_main_process, log
from llama2_jax.runtime.jsonl import check_settings
from llama2_jax.stages import evaluate
from llama2_jax.stages.evaluate import EvaluateConfig
from llama2_jax.text.tokenizer import Tokenizer

DOCUMENTS = 256  # encoded in one call


def run(config: EvaluateConfig, corpus: str) -> list[dict[str, Any]]:
    """Evaluates the model, reads the corpus once, and writes OUTPUT/contamination.json and contamination.md; resumes.

    Args:
      config: The evaluation; its results are kept in OUTPUT/evaluation.
      corpus: Sources of documents, separated by commas.

    Raises:
      UserError: Any mistake in the model, the tasks or the corpus.
    """
    names = [component.source for component in parse_mixture(corpus)]
    path = make_directory(config.output)
    tokenizer = tokenizer_of(open_language_model(config.model))
    examples = {name: read_examples(name, config) for name in expand(config.tasks)}
    settings = {
        'corpus': {name: sources.fingerprint(name) for name in names}, 'tokenizer': tokenizer.fingerprint,
        'samples': {name: len(found) for name, found in examples.items()},
    }  # fmt: skip
    evaluate.run(dataclasses.replace(config, output=str(path / 'evaluation')))
    spans = find_spans(examples, names, tokenizer, settings, path / 'spans.json')
    rows = [
        row for task in examples for row in as_rows(task, spans[task], read_json(path / 'evaluation' / f'{task}.json')['values'])
    ]
    text = markdown(rows)
    if is_main_process():
        write_atomically(path / 'contamination.json', json.dumps(rows, indent=1) + '\n')
        write_atomically(path / 'contamination.md', text + '\n')
    log(text)
    return rows


def read_examples(name: str, config: EvaluateConfig) -> list[Example]:
    """The examples that the evaluation asks, without solved ones in their prompts.

    Raises:
      UserError: The set holds other examples then, as its solved ones are taken from them.
    """
    files = Files(config.data_dir, config.tfds)
    asked, plain = TASKS[name].examples(files), dataclasses.replace(TASKS[name], shots=0).examples(files)
    if len(asked) != len(plain):
        raise UserError(f'{name} takes its solved examples from those that it asks, which cannot be compared: leave it out.')
    return spread(plain, config.limit)


def find_spans(
    examples: Mapping[str, list[Example]], names: list[str], tokenizer: Tokenizer, settings: dict[str, Any], file: Path
) -> dict[str, Spans]:
    """The spans of every task; those of an earlier run are read from the file."""
    found = {
        task: Spans([tokenizer.encode(verbalise(example), bos=False, eos=False) for example in some])
        for task, some in examples.items()
    }
    settings = json.loads(json.dumps(settings))
    if file.exists():
        saved = read_json(file)
        check_settings(file, settings, saved['settings'])
        for task, spans in found.items():
            spans.longest = [np.array(lengths, np.int32) for lengths in saved['longest'][task]]
        return found
    batch: list[str] = []
    with tqdm(unit='document', desc='reading the corpus', dynamic_ncols=True, disable=not is_main_process()) as bar:

        def flush() -> None:
            for ids in tokenizer.encode_batch(batch, bos=False, eos=False):
                for spans in found.values():
                    spans.add(ids)
            bar.update(len(batch))
            batch.clear()

        for name in names:
            for document in sources.read_documents(name):
                batch.append(document)
                if len(batch) == DOCUMENTS:
                    flush()
        flush()
    if is_main_process():
        longest = {task: [lengths.tolist() for lengths in spans.longest] for task, spans in found.items()}
        write_atomically(file, json.dumps({'settings': settings, 'longest': longest}))
    return found
