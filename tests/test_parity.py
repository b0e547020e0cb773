"""Against transformers and torch: the same weights give the same logits, losses, gradients, updates and text."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface import from_theirs, random_pair, to_theirs

from llama2_jax.config import ModelConfig
from llama2_jax.inference.engine import Engine, Request
from llama2_jax.mesh import decoding_mesh
from llama2_jax.model.llama import ComputeConfig, Llama
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.optimizer import OptimizerConfig, make_optimizer, schedule

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')

GQA = ModelConfig(vocab_size=97, dim=48, layers=3, heads=6, kv_heads=2, head_dim=8, hidden=80, context=64)
MHA = dataclasses.replace(GQA, kv_heads=6)


def relative(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize(('config', 'remat'), [(MHA, 'none'), (GQA, 'none'), (GQA, 'full')], ids=['MHA', 'GQA', 'remat'])
def test_logits_loss_and_gradients(config, remat):
    ours, theirs = random_pair(config)
    tokens = np.random.default_rng(1).integers(config.vocab_size, size=(3, 33)).astype(np.int32)
    labels = torch.tensor(tokens).long()
    answer = theirs(labels, labels=labels)
    answer.loss.backward()
    compute = dataclasses.replace(ComputeConfig().on('cpu'), remat=remat)

    def loss(model):
        hidden_BLD = model(tokens[:, :-1], compute=compute)
        return model.loss(hidden_BLD, tokens[:, 1:], jnp.ones((3, 32))) / 96

    logits = jax.jit(lambda model: model.logits(model(tokens, compute=compute)))(ours)
    np.testing.assert_allclose(logits, answer.logits.detach(), rtol=0, atol=1e-4)
    value, gradients = jax.jit(jax.value_and_grad(loss))(ours)
    assert abs(float(value) - answer.loss.item()) < 1e-5
    gradients = to_theirs(gradients)
    assert gradients.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert relative(gradients[name], parameter.grad.numpy()) < 1e-4, name


def test_adamw_schedule_and_clipping_are_those_of_torch():
    """Twelve steps, gradients above and below the norm that is clipped, decay for matrices only."""
    config, steps = OptimizerConfig(peak_lr=0.02, warmup_steps=4), 12
    params = Llama(GQA, jax.random.key(0))
    theirs = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in to_theirs(params).items()}
    groups = [
        {'params': [p for p in theirs.values() if p.ndim > 1], 'weight_decay': 0.1},
        {'params': [p for p in theirs.values() if p.ndim == 1], 'weight_decay': 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-5)

    def rate(step):
        if step < 4:
            return 0.02 * step / 4
        return 0.002 + 0.018 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, rate)
    optimizer = make_optimizer(config, steps)
    update = jax.jit(optimizer.update)
    state, rng = optimizer.init(params), np.random.default_rng(0)
    for step in range(steps):
        assert abs(float(schedule(config, steps)(step)) - rate(step)) < 1e-8
        scale = 10.0 ** rng.uniform(-5, 0)
        gradients = jax.tree.map(lambda leaf, scale=scale: scale * rng.normal(size=leaf.shape).astype(np.float32), params)
        for name, array in to_theirs(gradients).items():
            theirs[name].grad = torch.tensor(array)
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.step()
        scheduler.step()
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    for name, array in to_theirs(params).items():
        np.testing.assert_allclose(array, theirs[name].detach(), rtol=0, atol=2e-6, err_msg=name)


def test_schedule_by_hand():
    rate = schedule(OptimizerConfig(peak_lr=3e-4, warmup_steps=2000), 10_000)
    expected = {0: 0.0, 1: 1.5e-7, 1000: 1.5e-4, 2000: 3e-4, 6000: 1.65e-4, 10_000: 3e-5, 12_000: 3e-5}
    assert {step: round(float(rate(step)), 10) for step in expected} == expected


def test_a_run_of_one_step_has_no_warmup():
    one = schedule(OptimizerConfig(peak_lr=2e-5, warmup_steps=0, warmup_share=0.03), 1)
    two = schedule(OptimizerConfig(peak_lr=2e-5, warmup_steps=0, warmup_share=0.03), 2)
    assert one(0) == pytest.approx(2e-5) and [float(two(step)) for step in range(2)] == pytest.approx([0, 2e-5])


@pytest.fixture(scope='module')
def stories(fixtures):
    """The 260K-parameter story model and its golden results."""
    directory = fixtures / 'stories260K'
    if not directory.exists():
        pytest.skip(f'no model at {directory}')
    from safetensors.numpy import load_file

    config = ModelConfig(vocab_size=512, dim=64, layers=5, heads=8, kv_heads=4, head_dim=8, hidden=172, context=512)
    model = from_theirs(config, load_file(directory / 'hf' / 'model.safetensors'))
    return directory, model, json.loads((directory / 'golden.json').read_text()), np.load(directory / 'golden_logits_first32.npy')


def test_logits_of_stories260k(stories):
    _, model, golden, logits = stories
    tokens = np.array([golden['greedy'][:32]], np.int32)
    np.testing.assert_allclose(model.logits(model(tokens))[0], logits, rtol=0, atol=1e-3)


def test_greedy_text_of_stories260k(stories):
    directory, model, golden, _ = stories
    prompt, new = golden['prompt'], golden['greedy'][len(golden['prompt']) :]
    assert len(new) == 200
    engine = Engine(model, Tokenizer(directory / 'hf'), mesh=decoding_mesh(model.config, jax.devices()[:1]))
    [[sample]] = engine.generate([Request(prompt, 200, temperature=0)])
    assert sample.token_ids == new
