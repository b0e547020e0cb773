"""What reward models are worth on comparisons, and scores of a file of dialogs."""

import json
from collections.abc import Sequence

from etils.epath import Path
from tqdm import tqdm

from llama2_jax.checkpoints.fingerprint import identity
from llama2_jax.config import UserError
from llama2_jax.data.schemas import read_dialogs
from llama2_jax.data.sources import as_source, read_records, rows_fingerprint
from llama2_jax.evals import preference
from llama2_jax.files import make_directory, write_atomically
from llama2_jax.inference.open import open_scorer
from llama2_jax.runtime import is_main_process, log
from llama2_jax.runtime.jsonl import growing, resume
from llama2_jax.text.dialog import encode_dialog

CHUNK = 16  # batches that are scored, then written


def evaluate(models: Sequence[str], sources: Sequence[str], output: str | None, batch_size: int) -> dict:
    """Judges reward models on sources of comparisons and prints a table; `output` gets preferences.json and a plot of each model.

    Raises:
      UserError: a model or a source cannot be read.
    """
    if output:
        make_directory(output)
    results: dict[str, dict] = {}
    for number, model in enumerate(models):
        scorer = open_scorer(model, batch_size)
        judged = [preference.judge(scorer, source) for source in sources]
        results[model] = {row.source: preference.figures(row) for row in judged}
        log(preference.table({model: results[model]}))
        if output and is_main_process():
            preference.plot(Path(output) / f'preferences{f"-{number + 1}" if len(models) > 1 else ""}.png', model, judged)
    if output and is_main_process():
        write_atomically(Path(output) / 'preferences.json', json.dumps(results, indent=2) + '\n')
    return results


def score_file(model: str, dialogs: str, output: str, batch_size: int) -> None:
    """Scores the last answers of a file of dialogs; results are written as they come, in order.

    A line is {"id", "score", "probability"}: the linear score, shifted as the model's config.json says, and its sigmoid. The same
    call again goes on where the last one stopped.

    Raises:
      UserError: a row that is no answered dialog (all are looked at first), or an output of another model or other dialogs.
    """
    scorer = open_scorer(model, batch_size)
    source = as_source(dialogs)
    names = [record.fields.get('id', index) for index, record in enumerate(read_records(source))]
    rows, texts = [], []
    for where, dialog in read_dialogs(source):
        if not dialog:
            raise UserError(f'{where}: there is no answer to score.')
        ids, _ = encode_dialog(dialog, scorer.tokenizer, where)
        if len(ids) > scorer.config.context:
            raise UserError(f'{where}: the dialog has {len(ids)} tokens, beyond the context of {scorer.config.context}.')
        rows.append(ids)
        texts.append((dialog, where))
    path = Path(output)
    done = resume(path, {**identity(model), 'content of the dialogs': rows_fingerprint(texts)}, names)
    if done:
        log(f'{output}: {done} of {len(rows)} are there already.')
    bar = tqdm(total=len(rows), initial=done, unit='answer', dynamic_ncols=True, disable=not is_main_process())
    with bar, growing(path) as add:
        for start in range(done, len(rows), CHUNK * batch_size):
            scores = scorer.score(rows[start : start + CHUNK * batch_size])
            for name, score, probability in zip(
                names[start:], scores.tolist(), preference.sigmoid(scores).tolist(), strict=False
            ):
                add({'id': name, 'score': score, 'probability': probability})
            bar.update(len(scores))
