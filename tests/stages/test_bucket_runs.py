"""Runs whose workdir is in a bucket: the same files as on a disk, interrupted runs and what other stages make of them."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import Path
from test_pretrain_stage import config

from llama2_jax.checkpoints.load import load_model
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.inference.engine import Engine
from llama2_jax.runtime.jsonl import add_rows, resume_rows
from llama2_jax.runtime.workdir import open_run
from llama2_jax.stages import generate, pretrain
from llama2_jax.train.metrics import Report

pytestmark = [
    pytest.mark.usefixtures('mesh', 'one_device', 'compiled_once'),
    pytest.mark.filterwarnings('default'),  # Google's libraries warn
]

CLOCK = {'seconds', 'tokens_per_second', 'tflops', 'mfu'}


def trace(text):
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in text.splitlines()]


def test_a_run_in_a_bucket_is_one_on_a_disk(objects, tmp_path, monkeypatch):
    objects.clear()
    settings, here, there, write = config(tmp_path), tmp_path / 'run', 'gs://bucket/run', Report.write
    pretrain.run(settings, here)
    with monkeypatch.context() as patch:
        patch.setattr(Report, 'write', lambda self, line: 1 / 0 if line['step'] == 9 else write(self, line))
        with pytest.raises(ZeroDivisionError):
            pretrain.run(settings, there)
    assert [line['step'] for line in trace(objects['run/metrics.jsonl'])] == list(range(1, 9))
    assert 'run/model/config.json' not in objects
    pretrain.run(settings, there)
    assert trace(objects['run/metrics.jsonl']) == trace((here / 'metrics.jsonl').read_bytes())
    for name in ('samples.md', 'tokenizer.model', 'config.json'):
        assert objects[f'run/{name}'] == (here / name).read_bytes(), name
    assert objects['run/loss.png'].startswith(b'\x89PNG')
    assert {name.split('/')[2] for name in objects if name.startswith('run/checkpoints/')} >= {'6', '12'}
    events = [content for name, content in objects.items() if name.startswith('run/tensorboard/')]
    assert len(events) == 2 and all(b'heldout/loss' in content for content in events)
    for ours, theirs in zip(*(jax.tree.leaves(load_model(f'{run}/model')) for run in (here, there)), strict=True):
        if isinstance(ours, jax.Array):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UserError, match=r'^gs://bucket/run belongs to a run with seed=0, and this one has seed=1'):
        pretrain.run(config(tmp_path, seed=1), there)


def test_what_other_stages_write(objects, tmp_path):
    objects.clear()
    pretrain.run(config(tmp_path, tokens=3 * 8 * 32), 'gs://bucket/run')
    (tmp_path / 'prompts.jsonl').write_text(''.join(json.dumps({'prompt': text}) + '\n' for text in ('Dear', 'The', 'A')))
    model, tokenizer = load_model('gs://bucket/run/model')
    engine = Engine(model, tokenizer, batch_size=4)
    settings = {'max_new_tokens': 4, 'temperature': 0.0, 'seed': 0}
    for output in (str(tmp_path / 'out.jsonl'), 'gs://bucket/out.jsonl', 'gs://bucket/out.jsonl'):
        generate.run(engine, str(tmp_path / 'prompts.jsonl'), output, settings, {'model': 'run/model'})
    assert objects['out.jsonl'] == (tmp_path / 'out.jsonl').read_bytes()
    path = Path('gs://bucket/rows.jsonl')
    for number in range(2):
        assert len(resume_rows(path)) == number
        add_rows(path, [{'number': number}])
    assert objects['rows.jsonl'] == b'{"number": 0}\n{"number": 1}\n'


def test_a_bucket_that_cannot_be_reached(monkeypatch):
    def is_dir(self):
        raise ImportError('Please install gcsfs to access Google Storage')

    monkeypatch.setattr(epath.gpath._GPath, 'is_dir', is_dir)
    with pytest.raises(UserError, match=r'^gs://bucket/run cannot be reached: Please install gcsfs'):
        open_run('gs://bucket/run', ModelConfig())
