"""Our scores against lm-evaluation-harness on the same local files and exported weights (pip install lm_eval==0.4.13 torch).

python benchmarks/against_lm_eval.py --model=run/model --data_dir=benchmarks_data --limit=200

Multiple choice: MMLU by its letters, and by the texts of its options, which are as long as HellaSwag's endings; accuracy, and for
the texts accuracy per byte, must be the same, and so must every prediction. GSM8K: numbers that its filters and ours find in the
same texts. Ends with exit code 1 where anything differs.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

from llama2_jax.evals.answers import extract_number
from llama2_jax.evals.files import Files
from llama2_jax.evals.prompter import encode_pairs
from llama2_jax.evals.task import Example
from llama2_jax.evals.tasks import TASKS
from llama2_jax.inference.engine import Engine
from llama2_jax.inference.open import open_engine
from llama2_jax.runtime import start
from llama2_jax.stages.evaluate import spread

MODEL = flags.DEFINE_string('model', None, 'A model of any format.', required=True)
DATA_DIR = flags.DEFINE_string('data_dir', None, 'Holds mmlu and gsm8k.', required=True)
LIMIT = flags.DEFINE_integer('limit', 200, 'Questions of each kind.')
SHOTS = flags.DEFINE_integer('shots', 0, 'Examples of MMLU; a toy context has no room for any.')
ROOT = Path(__file__).parents[1]
OPTION = re.compile(r'\n[ABCD]\. (.*)')


def questions(engine: Engine) -> dict[str, list[Example]]:
    """MMLU's questions that fit the context, with letters to choose from, and with the texts of the options."""
    fitting = [
        example
        for example in TASKS['mmlu'].read(Files(DATA_DIR.value), SHOTS.value)
        if len(engine.tokenizer.encode(example.choices[0][0], bos=True, eos=False)) < engine.config.context - 1
    ]
    letters = spread(fitting, LIMIT.value)
    texts = []
    for example in letters:
        context = example.choices[0][0]
        options = OPTION.findall(context)[-4:]
        start_of_options = context.rindex('\nA. ')
        texts.append(Example(example.target, choices=tuple((context[:start_of_options] + '\nAnswer:', f' {o}') for o in options)))
    return {'letters': letters, 'texts': texts}


def ours(engine: Engine, examples: list[Example]) -> dict[str, list[int]]:
    """Predictions by likelihood, and by likelihood per byte."""
    found = dict(engine.log_likelihoods([encode_pairs(example.choices, engine.tokenizer) for example in examples]))
    predictions: dict[str, list[int]] = {'acc': [], 'acc_norm': []}
    for number, example in enumerate(examples):
        lengths = [len(text[1:].encode()) for _, text in example.choices]
        predictions['acc'].append(int(np.argmax(found[number])))
        predictions['acc_norm'].append(int(np.argmax(np.divide(found[number], lengths))))
    return predictions


def theirs(name: str, examples: list[Example], exported: str, folder: Path) -> tuple[dict[str, float], list[int]]:
    """lm-eval's accuracies, and its predictions by likelihood."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = folder / f'{name}.jsonl'
    rows.write_text(
        ''.join(
            json.dumps({'text': e.choices[0][0], 'options': [text[1:] for _, text in e.choices], 'gold': e.target}) + '\n'
            for e in examples
        )
    )
    tasks = folder / name
    tasks.mkdir()
    (tasks / 'task.yaml').write_text(
        f'task: ours_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {rows}\ntest_split: test\n'
        'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_choice: options\ndoc_to_target: gold\nmetric_list:\n'
        '  - metric: acc\n  - metric: acc_norm\n'
    )
    result = lm_eval.simple_evaluate(
        model='hf',
        model_args={'pretrained': exported, 'dtype': 'float32', 'device': 'cpu', 'add_bos_token': True},
        tasks=[f'ours_{name}'],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=8,
        bootstrap_iters=0,
    )
    samples = sorted(result['samples'][f'ours_{name}'], key=lambda sample: sample['doc_id'])
    predictions = [int(np.argmax([response[0][0] for response in sample['resps']])) for sample in samples]
    figures = result['results'][f'ours_{name}']
    return {metric: figures[f'{metric},none'] for metric in ('acc', 'acc_norm')}, predictions


def numbers_differ() -> list[str]:
    """Texts of GSM8K in which lm-eval's filters of gsm8k_cot find another number than ours, and ours is wrong."""
    from lm_eval.filters.extraction import RegexFilter

    strict = RegexFilter(r'The answer is (\-?[0-9\.\,]+).')
    flexible = RegexFilter(r'(-?[$0-9.,]{2,})|(-?[0-9]+)', group_select=-1)
    rows = [row['answer'] for row in Files(DATA_DIR.value).rows('gsm8k/**/*.jsonl')]
    texts = [re.sub(r'<<.*?>>', '', answer) for answer in rows]
    texts = [text.replace('####', 'The answer is') + '.' for text in texts] + [text.split('\n####')[0] for text in texts]
    found = zip(*(some.apply([[text] for text in texts], [{}] * len(texts)) for some in (strict, flexible)), strict=True)
    differing = []
    for text, answer, ([exact], [loose]) in zip(texts, [*rows, *rows], found, strict=True):
        number = loose if exact == '[invalid]' else exact
        if extract_number(text) not in (extract_number(number.strip('$.,')), extract_number(answer)):
            differing.append(f'{text[-80:]!r}: {number} and {extract_number(text)}')
    print(f'GSM8K: {len(texts):,} texts, {len(differing)} with other numbers')
    return differing


def main(argv: list[str]) -> None:
    """Compares."""
    start()
    os.environ['HF_HUB_OFFLINE'] = os.environ['HF_DATASETS_OFFLINE'] = '1'
    wrong = numbers_differ()
    with tempfile.TemporaryDirectory() as name:
        exported = f'{name}/hf'
        command = [sys.executable, ROOT / 'experiments/convert.py', f'--input={MODEL.value}', f'--output={exported}', '--to=hf']
        subprocess.run(command, check=True)
        engine = open_engine(MODEL.value)
        for kind, examples in questions(engine).items():
            mine, (figures, predictions) = ours(engine, examples), theirs(kind, examples, exported, Path(name))
            accuracy = {
                metric: float(np.mean([p == e.target for p, e in zip(mine[metric], examples, strict=True)])) for metric in figures
            }
            same = float(np.mean(np.equal(mine['acc'], predictions)))
            print(f'{kind}: ours {accuracy}, lm-eval {figures}, {same:.1%} of {len(examples)} predictions the same')
            wrong += [f'{kind}: {metric}' for metric in figures if abs(accuracy[metric] - figures[metric]) > 1e-9]
            wrong += [f'{kind}: predictions'] * (same < 1)
    sys.exit('\n'.join(wrong) or 0)


if __name__ == '__main__':
    app.run(main)
