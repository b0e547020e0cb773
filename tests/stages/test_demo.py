"""The demo's summary, from files such as its stages leave; and its script."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from llama2_jax import toy
from llama2_jax.config import UserError
from llama2_jax.stages.demo import MEASURES, VERSIONS, summarise

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path):
    ratings = {f'heldout/accuracy/{rating}': 0.9 for rating in ('significantly', 'better', 'slightly', 'negligibly')}
    lines = {
        'pretrain': {'heldout/loss': 0.84},
        'sft': {'toy/learnable/exact': 0.75},
        'rm-help': ratings,
        'rm-safe': ratings,
        'rm-renewed': ratings,
        'ppo': {'kl': 2.5},
    }
    for stage, line in lines.items():
        (tmp_path / stage).mkdir()
        # The last line need not have every figure.
        (tmp_path / stage / 'metrics.jsonl').write_text(json.dumps({'step': 1, **line}) + '\n' + json.dumps({'step': 2}) + '\n')
    questions = list(toy.RECORDS['heldout']())
    for number, version in enumerate(VERSIONS):
        path = tmp_path / 'eval' / version
        path.mkdir(parents=True)
        (path / 'toy.json').write_text(json.dumps({'measures': dict.fromkeys(MEASURES, number / 8) | {'other': 1.0}}))
        # Of 8 answers in turn, `number` have all measures.
        marks = (dict.fromkeys(MEASURES, float(index % 8 < number)) for index in range(8 * (len(questions) // 8 + 1)))
        records = (json.dumps({'prediction': f'{version} on {index}.', **mark}) for index, mark in enumerate(marks))
        (path / 'toy.jsonl').write_text('\n'.join(records) + '\n')
    return tmp_path


def test_summary(home, capsys):
    summarise(home)
    text = (home / 'summary.md').read_text()
    assert capsys.readouterr().out == text
    assert '| pretraining | held-out loss | 0.840 nats a token |' in text
    assert '| SFT | held-out questions answered exactly | 75.0% |' in text
    assert '| safety reward model | accuracy where raters said slightly | 90.0% |' in text
    assert '| PPO | KL from where it began | 2.50 nats an answer |' in text
    assert '| version | helpfulness, n = 944 | harmlessness, n = 944 | violations, n = 944 |' in text
    row = next(line for line in text.splitlines() if line.startswith('| rejection sampling | '))
    assert row.startswith('| rejection sampling | 25.0% (22–28) | 25.0% (22–28) | 25.0% (22–28) |')  # Wilson's by hand: 22.3–27.9
    rows = json.loads((home / 'versions.json').read_text())
    assert [row['version'] for row in rows] == ['base', 'SFT', 'rejection sampling', 'PPO'] and rows[3]['helpfulness'] == 3 / 8
    questions = list(toy.RECORDS['heldout']())
    shown = re.findall(r'\*\*(.+)\*\*\n\n- base: pretrain on (\d+)\.\n- SFT: sft on (\d+)\.', text)
    assert len(shown) == 7
    for question, base, sft in shown:
        assert base == sft and questions[int(base)]['messages'][-1]['content'] == question


def test_a_stage_that_is_missing(home):
    (home / 'eval' / 'rs' / 'toy.json').unlink()
    with pytest.raises(UserError, match='eval/rs: the model rs has not been evaluated'):
        summarise(home)


def test_another_scale():
    result = subprocess.run([ROOT / 'experiments' / 'demo.sh', 'huge'], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, 'SCALE=huge: tiny or small.\n')
