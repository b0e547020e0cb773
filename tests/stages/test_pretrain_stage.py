"""What the pretraining stage adds to its parts: targets and weights, held-out figures, the model directory, its mistakes."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.checkpoints.directory import save_model
from llama2_jax.checkpoints.load import load_model
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.data.pretrain import DataConfig
from llama2_jax.mesh import MeshConfig, replicate, reshard, set_mesh
from llama2_jax.model.llama import Llama
from llama2_jax.stages import pretrain
from llama2_jax.stages.pretrain import PretrainConfig
from llama2_jax.text.tokenizer import train_tokenizer
from llama2_jax.train.loop import LoopConfig
from llama2_jax.train.metrics import read_metrics
from llama2_jax.train.optimizer import OptimizerConfig

MODEL = ModelConfig(vocab_size=384, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=64)


pytestmark = pytest.mark.usefixtures('mesh')


def config(tmp_path, **changes) -> PretrainConfig:
    settings = {
        'model': MODEL,
        'data': DataConfig(mixture='toy:letters, toy:guides:2', cache_dir=str(tmp_path / 'cache'), heldout=0.05),
        'optimizer': OptimizerConfig(peak_lr=1e-2, warmup_steps=2),
        'loop': LoopConfig(log_every=1, eval_every=6, sample_every=6, checkpoint_every=6),
        'tokens': 12 * 8 * 32,
        'batch_size': 8,
        'length': 32,
        'prompts': ('Dear', 'The town'),
    }
    return PretrainConfig(**(settings | changes))


def test_split_of_packed_documents():
    batch = {'tokens': jnp.array([[1, 5, 2, 1, 6, 0]]), 'segment_ids': jnp.array([[1, 1, 1, 2, 2, 0]])}
    crossing, masked = pretrain.split(batch, False), pretrain.split(batch, True)
    assert crossing['inputs'].tolist() == [[1, 5, 2, 1, 6]]
    assert crossing['targets'].tolist() == [[5, 2, 1, 6, 0]]
    assert crossing['weights'].tolist() == [[1, 1, 1, 1, 0]]  # padding is no target, the next document's BOS is
    assert masked['weights'].tolist() == [[1, 1, 0, 1, 0]]  # and with masking it is not either
    assert masked['segments'].tolist() == [[1, 1, 1, 2, 2]]
    assert 'segments' not in crossing


def test_a_run_learns_and_writes_its_directory(tmp_path):
    pretrain.run(config(tmp_path), tmp_path / 'run')
    lines = read_metrics(tmp_path / 'run/metrics.jsonl')
    assert [line['step'] for line in lines] == list(range(1, 13))
    assert lines[0]['loss'] == pytest.approx(math.log(384), abs=0.7)  # at the start every piece is about as likely
    assert lines[-1]['loss'] < lines[0]['loss'] - 0.5
    last = lines[-1]
    mean = (last['heldout/toy:letters/loss'] + 2 * last['heldout/toy:guides/loss']) / 3  # the mixture's weights
    assert last['heldout/loss'] == pytest.approx(mean, rel=1e-6)
    meta = json.loads(next((tmp_path / 'cache').glob('*letters*/meta.json')).read_text())
    tokens = sum(part['items']['heldout'] for part in meta['parts'])
    size = sum(part['counts']['heldout bytes'] for part in meta['parts'])
    bits = last['heldout/toy:letters/loss'] / math.log(2) * tokens / size
    assert last['heldout/toy:letters/bits_per_byte'] == pytest.approx(bits, rel=1e-6)
    assert (tmp_path / 'run/samples.md').read_text().count('## Step') == 2
    written = json.loads((tmp_path / 'run/model/config.json').read_text())
    assert written['provenance'] == {'stage': 'pretrain', 'parent': None, 'step': 12}


def test_held_out_loss_is_that_of_the_whole_split(tmp_path):
    """All held-out text in one go gives the same mean as batches with padding rows."""
    some = config(tmp_path, eval_batches=0)
    pretrain.run(some, tmp_path / 'run')
    model, tokenizer = load_model(tmp_path / 'run/model')
    data = pretrain.PretrainData(some.data, tokenizer, length=32, batch_size=8, seed=0, steps=12)
    scores = jax.jit(lambda tokens: replicate(model.logits(model(reshard(tokens, 'BL')))))
    nats = tokens = 0.0
    for batch in data.heldout(0):
        logs = np.asarray(jax.nn.log_softmax(scores(batch['tokens'][:, :-1])))
        for row, targets, segments in zip(logs, batch['tokens'][:, 1:], batch['segment_ids'], strict=True):
            used = max(int((segments > 0).sum()) - 1, 0)
            nats -= sum(float(row[i, targets[i]]) for i in range(used))
            tokens += used
    line = read_metrics(tmp_path / 'run/metrics.jsonl')[-1]
    assert line['heldout/toy:letters/loss'] == pytest.approx(nats / tokens, rel=1e-5)


def test_model_directory_round_trip_and_mistakes(tmp_path):
    tokenizer = train_tokenizer(['some words to learn from, and some more of them'] * 20, tmp_path / 'tokenizer.model', 290)
    shape = ModelConfig(vocab_size=290, dim=32, layers=2, heads=4, kv_heads=2, head_dim=8, hidden=48, context=64)
    set_mesh(MeshConfig(fsdp=4, tensor=2))
    model = jax.jit(lambda key: Llama(shape, key))(jax.random.key(0))
    save_model(tmp_path / 'model', model, tokenizer, {'stage': 'test', 'parent': None, 'step': 1})
    save_model(tmp_path / 'model', model, tokenizer, {'stage': 'test', 'parent': None, 'step': 2})  # in place of the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ['model', 'tokenizer.model']
    set_mesh(MeshConfig(fsdp=8))
    read, _ = load_model(tmp_path / 'model')
    for ours, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(read), strict=True):
        assert np.array_equal(jax.device_get(ours), jax.device_get(theirs))
    with pytest.raises(UserError, match='There is no model at'):
        load_model(tmp_path / 'nothing')
    text = (tmp_path / 'model/config.json').read_text()
    (tmp_path / 'model/config.json').write_text(text.replace('"dim": 32', '"dim": 64'))
    with pytest.raises(UserError, match=r"'table_VD' has the shape \[290, 32\], not \[290, 64\]"):
        load_model(tmp_path / 'model')
    (tmp_path / 'model/config.json').write_text(text.replace('"heads": 4', '"headz": 4'))
    with pytest.raises(UserError, match=r"unknown field 'headz'; did you mean 'heads'\?"):
        load_model(tmp_path / 'model')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'batch_size': 12}, 'batch_size=12 in accumulation=1 parts cannot be divided over replica × fsdp = 8 devices'),
        ({'mesh': MeshConfig(fsdp=2, tensor=4)}, 'model.kv_heads=2 cannot be divided over the 4 devices'),
        ({'optimizer': OptimizerConfig(warmup_steps=12)}, 'warmup_steps=12 must be less than the 12 steps'),
        ({'tokenizer': 'nowhere.model'}, 'There is no tokenizer at nowhere.model'),
        ({'data': DataConfig(mixture='toy:leters')}, "did you mean 'letters'"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, message):
    with pytest.raises(UserError, match='.*'.join(message.split('*'))):
        pretrain.run(config(tmp_path, **changes), tmp_path / 'run')


def test_a_wrong_tokenizer_is_named_and_the_workdir_stays_usable(tmp_path):
    train_tokenizer(['some words to learn from, and some more of them'] * 20, tmp_path / 'tokenizer.model', 290)
    with pytest.raises(UserError, match='has 290 pieces, and the model has model.vocab_size=384'):
        pretrain.run(config(tmp_path, tokenizer=str(tmp_path / 'tokenizer.model')), tmp_path / 'run')
    pretrain.run(config(tmp_path, tokens=4 * 8 * 32), tmp_path / 'run')
    with pytest.raises(UserError, match=r'belongs to a run with tokens=1024, and this one has tokens=3072'):
        pretrain.run(config(tmp_path), tmp_path / 'run')
