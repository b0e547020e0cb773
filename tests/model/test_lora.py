"""Adapters beside a frozen model: the same as merged, on any mesh, and what `peft` makes of them."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.checkpoints.formats.peft import write_peft
from llama2_jax.config import ModelConfig, UserError
from llama2_jax.mesh import MeshConfig, make_mesh, parameter_letters, replicate, reshard
from llama2_jax.model.llama import Llama
from llama2_jax.model.lora import MATRICES, LoraConfig, adapt, make_adapters, merge, names, to_int8
from llama2_jax.train.optimizer import decays

SHAPE = ModelConfig(vocab_size=96, dim=32, layers=2, heads=8, kv_heads=2, head_dim=8, hidden=48, context=32)
LORA = LoraConfig(rank=4, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(96, size=(4, 16)).astype(np.int32)


def some_adapters(lora=LORA):
    """None of whose factors is zero."""
    adapters = make_adapters(SHAPE, lora, jax.random.key(1))
    return jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapters)


def loss(model):
    tokens = reshard(jnp.asarray(TOKENS), 'BL')
    return model.loss(model(tokens), tokens, reshard(jnp.ones(TOKENS.shape), 'BL')) / TOKENS.size


def relative(ours, theirs):
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


def test_names():
    assert [names(matrix) for matrix in ('q', 'v', 'o', 'down')] == [
        ('w_q_DHK', 'a_q_DA', 'b_q_AHK'),
        ('w_v_DGK', 'a_v_DA', 'b_v_AGK'),
        ('w_o_DHK', 'a_o_HKA', 'b_o_AD'),
        ('w_down_DF', 'a_down_FA', 'b_down_AD'),
    ]
    sizes = {'D': 32, 'H': 8, 'G': 2, 'K': 8, 'F': 48, 'A': 4}
    adapters, model = make_adapters(SHAPE, LORA, jax.random.key(1)), Llama(SHAPE, jax.random.key(0))
    for matrix in MATRICES:
        weight, *factors = names(matrix)
        assert hasattr(model.blocks, weight)
        for name in factors:
            shape = getattr(adapters, name)[...].shape
            assert shape == (2, *(sizes[letter] for letter in parameter_letters(name)))
    assert all(jax.tree.leaves(decays(adapters)))


def test_the_model_begins_unchanged():
    model, adapters = Llama(SHAPE, jax.random.key(0)), make_adapters(SHAPE, LORA, jax.random.key(1))
    assert all(float(jnp.abs(getattr(adapters, names(matrix)[1])[...]).min()) > 0 for matrix in MATRICES)
    for ours, theirs in zip(jax.tree.leaves(merge(model, adapters, LORA)), jax.tree.leaves(model), strict=True):
        assert np.array_equal(ours, theirs)


def test_merging_by_hand():
    model, adapters = Llama(SHAPE, jax.random.key(0)), some_adapters()
    merged = merge(model, adapters, LORA)
    a, b = np.asarray(adapters.a_o_HKA[...])[1].reshape(64, 4), np.asarray(adapters.b_o_AD[...])[1]
    expected = np.asarray(model.blocks.w_o_DHK[...])[1] + 1.5 * (a @ b).T.reshape(32, 8, 8)
    np.testing.assert_allclose(merged.blocks.w_o_DHK[...][1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('sizes', [None, MeshConfig(fsdp=2, sequence=2, tensor=2)], ids=['one device', 'mesh'])
def test_merged_is_beside(sizes):
    """The forward pass to 1e-5, and the gradients of the factors to 1e-4."""
    model, adapters = Llama(SHAPE, jax.random.key(0)), some_adapters()
    value, gradients = jax.jit(jax.value_and_grad(lambda adapters: loss(merge(model, adapters, LORA))))(adapters)
    plain = jax.jit(loss)(model)
    assert abs(float(plain - value)) > 0.05  # the adapters do something
    gradients = jax.tree.map(np.asarray, gradients)

    def ours():
        model = jax.jit(partial(Llama, SHAPE))(jax.random.key(0))
        placed = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding), adapters, make_adapters(SHAPE, LORA, jax.random.key(1))
        )
        found, grads = jax.jit(jax.value_and_grad(lambda factors, model: loss(adapt(model, factors, LORA))))(placed, model)
        merged = jax.jit(loss)(merge(model, placed, LORA))
        return float(found), float(merged), jax.tree.map(lambda x: np.asarray(jax.jit(replicate)(x)), grads)

    if sizes is None:
        found, merged, grads = ours()
    else:
        with jax.set_mesh(make_mesh(sizes)):
            found, merged, grads = ours()
    assert abs(found - float(value)) < 1e-5 and abs(merged - float(value)) < 1e-5
    for mine, reference in zip(jax.tree.leaves(grads), jax.tree.leaves(gradients), strict=True):
        assert relative(mine, reference) < 1e-4


def test_a_frozen_model_in_bfloat16():
    """Gradients are the factors' alone, in float32."""
    model = jax.tree.map(lambda x: x.astype('bfloat16'), Llama(SHAPE, jax.random.key(0)))
    value, gradients = jax.jit(jax.value_and_grad(lambda factors: loss(adapt(model, factors, LORA))))(some_adapters())
    assert math.isfinite(value)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {'float32'}


@pytest.mark.filterwarnings('ignore::FutureWarning')  # peft asks transformers in an old way
@pytest.mark.parametrize('matrices', [('q', 'v'), tuple(MATRICES)], ids=['some', 'all'])
def test_peft_reads_them(tmp_path, matrices):
    torch, peft = pytest.importorskip('torch'), pytest.importorskip('peft')
    from huggingface import random_pair

    ours, theirs = random_pair(SHAPE)
    lora = LoraConfig(rank=4, alpha=6.0, matrices=matrices)
    adapters = some_adapters(lora)
    write_peft(tmp_path, adapters, lora, 'a/model')
    model = peft.PeftModel.from_pretrained(theirs, tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS).long()).logits.numpy()
    logits = jax.jit(lambda model: model.logits(model(TOKENS)))
    assert np.abs(np.asarray(logits(ours)) - expected).max() > 0.01
    np.testing.assert_allclose(logits(adapt(ours, adapters, lora)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'rank': -1}, 'rank is -1'),
        ({'rank': 1, 'matrices': ('q', 'gat')}, "lora.matrices: there is no 'gat'; did you mean 'gate'"),
        ({'rank': 1, 'matrices': ('q', 'q')}, 'lora.matrices names at least one matrix, and each once'),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError, match=message):
        LoraConfig(**settings)


def test_a_frozen_model_in_eight_bits():
    """What its layers compute, and the gradients of the factors, are those of the rounded matrices held in float32."""
    model, adapters = Llama(SHAPE, jax.random.key(0)), some_adapters()
    rounded = to_int8(model)
    assert rounded.blocks.w_o_DHK[...].values.dtype == np.int8 and rounded.table_VD[...].dtype == np.float32
    o = np.asarray(model.blocks.w_o_DHK[...]).reshape(2, 32, 64)
    plain = jax.tree.map(lambda x: x, model)

    def back(name, sums_D):
        matrix = getattr(rounded.blocks, name)[...]
        scales = matrix.scales[:, None] if sums_D else matrix.scales[:, :, None]
        return (matrix.values * scales).reshape(getattr(model.blocks, name)[...].shape)

    for matrix, (before, _) in MATRICES.items():
        name = names(matrix)[0]
        getattr(plain.blocks, name).set_value(back(name, before == 'D'))
    np.testing.assert_allclose(plain.blocks.w_o_DHK[...].reshape(2, 32, 64), o, rtol=0, atol=float(np.abs(o).max()) / 250)

    def ours(model, factors):
        return jax.jit(jax.value_and_grad(lambda factors: loss(adapt(model, factors, LORA))))(factors)

    expected, others = ours(plain, adapters)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        own = to_int8(jax.jit(partial(Llama, SHAPE))(jax.random.key(0)))
        like = make_adapters(SHAPE, LORA, jax.random.key(1))
        value, gradients = ours(own, jax.tree.map(lambda x, other: jax.device_put(x, other.sharding), adapters, like))
    assert abs(value - expected) < 1e-5 and abs(float(jax.jit(loss)(model)) - value) > 0.05
    for mine, reference in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        assert relative(mine, reference) < 1e-4
