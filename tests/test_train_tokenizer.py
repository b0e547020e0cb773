"""`experiments/train_tokenizer.py` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from llama2_jax.text.tokenizer import Tokenizer

SCRIPT = Path(__file__).parents[1] / 'experiments/train_tokenizer.py'


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_trains_a_tokenizer_and_shows_it(tmp_path):
    (tmp_path / 'corpus').mkdir()
    (tmp_path / 'corpus/a.txt').write_text('the cat sat on the mat\n' * 100)
    source = f'--set=source=text:{tmp_path}/corpus/*.txt'
    done = run('--config=tiny', source, '--set=vocab_size=280', f'--workdir={tmp_path}/tok')
    assert done.returncode == 0, done.stderr
    assert '280 pieces' in done.stdout
    assert 'bytes per token' in done.stdout
    assert Tokenizer(tmp_path / 'tok').vocab_size == 280
    assert json.loads((tmp_path / 'tok/config.json').read_text())['vocab_size'] == 280


def test_mistakes_end_in_one_sentence(tmp_path):
    workdir = f'--workdir={tmp_path}/tok'
    for arguments, sentence in {
        ('--config=tony', workdir): "--config=tony: no such preset; did you mean 'tiny'?",
        ('--set=vocab_sise=5', workdir): "did you mean 'vocab_size'?",
        ('--config=llama2', workdir): 'too small for a vocabulary of 32000: the largest possible one is',
    }.items():
        done = run(*arguments)
        assert done.returncode == 1
        assert sentence in done.stderr
        assert 'Traceback' not in done.stderr
        assert not (tmp_path / 'tok/tokenizer.model').exists()
