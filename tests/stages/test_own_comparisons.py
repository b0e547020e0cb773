"""The commands of docs/rlhf_on_your_own_comparisons.md, in their order, on 200 rows of each kind and a small random model."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import random_policy

ROOT = Path(__file__).parents[2]
PAGE = ROOT / 'docs' / 'rlhf_on_your_own_comparisons.md'
FEWER = {
    'rejection_sampling.py': ('count=12', 'samples=2', 'tune_prompts=2', 'max_new_tokens=32'),
    'ppo.py': ('iterations=1', 'batch_size=8', 'minibatch_size=4', 'eval_prompts=4', 'max_new_tokens=32', 'prompts.longest=96'),
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(random_policy, 'SHAPE', dataclasses.replace(random_policy.SHAPE, context=1024))
    asked = [{'messages': [{'role': 'user', 'content': f'What is {a} and {b}?'}]} for a in range(20) for b in range(10)]
    random_policy.make_home(tmp_path, asked, eos=6.0)
    (tmp_path / 'policy').rename(tmp_path / 'base')
    told = [{'messages': [*row['messages'], {'role': 'assistant', 'content': 'They are many.'}]} for row in asked]
    pairs = [{'prompt': row['messages'][0]['content'], 'chosen': 'They are many.', 'rejected': 'No.'} for row in asked]
    for name, rows in (('dialogs', told), ('comparisons', pairs)):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.slow
def test_every_command_of_the_page(home):
    commands = [shlex.split(line) for line in PAGE.read_text().splitlines() if line.startswith('python experiments/')]
    assert [Path(words[1]).name for words in commands] == ['sft.py', 'reward_model.py', 'rejection_sampling.py', 'ppo.py']
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    for _, program, *words in commands:
        fewer = [word for setting in FEWER.get(Path(program).name, ()) for word in ('--set', setting)]
        command = [sys.executable, str(ROOT / program), *words, *fewer]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert 'toy' not in done.stdout
    assert all((home / name / 'model' / 'config.json').exists() for name in ('sft', 'rm', 'rs', 'ppo'))
