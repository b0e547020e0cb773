from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.config import ModelConfig
from llama2_jax.inference.slots import shards
from llama2_jax.mesh import decoding_mesh, replicate, reshard
from llama2_jax.ops.attention import _largest_block, _padded, attention, attention_with_cache, implementation_for


def inputs(L, H, G, K, B=2, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(B, L, heads, K)).astype(np.float32) for heads in (H, G, G)]


def value_and_gradients(q, k, v, segments=None, **options):
    target = np.random.default_rng(9).normal(size=q.shape).astype(np.float32)

    def loss(q, k, v):
        out = attention(q, k, v, segments, **options)
        return jnp.sum(out * target), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize('implementation', ['reference', 'blockwise'])
def test_by_hand(implementation):
    """Head size 1, keys 0, ln 2, ln 6 and a query of 1 weigh 1 : 2 : 6; the values are 9, 0, 3."""
    q, k, v = (jnp.array(x).reshape(1, 3, 1, 1) for x in ([1.0, 1, 1], [0, np.log(2), np.log(6)], [9.0, 0, 3]))
    attend = partial(attention, q, k, v, implementation=implementation)
    np.testing.assert_allclose(attend().ravel(), [9, 9 / 3, (9 + 6 * 3) / 9], rtol=1e-6)
    np.testing.assert_allclose(attend(jnp.array([[1, 2, 2]])).ravel(), [9, 0, 6 * 3 / 8], rtol=1e-6, atol=1e-6)


def test_scores_are_divided_by_the_root_of_the_head_size():
    q, k = jnp.ones((1, 2, 1, 4)), jnp.array([0.0, np.log(3) / 2]).reshape(1, 2, 1, 1).repeat(4, axis=3)
    v = jnp.array([4.0, 0.0]).reshape(1, 2, 1, 1).repeat(4, axis=3)
    np.testing.assert_allclose(attention(q, k, v)[0, 1, 0], [1, 1, 1, 1], rtol=1e-6)  # exp(4 × ln(3)/2 / 2) = 3


def test_query_head_h_reads_key_head_h_over_group_size():
    """Values name their key head, so the outputs show who read what."""
    q, k, _ = inputs(5, 6, 2, 4)
    v = np.broadcast_to(np.array([10.0, 20.0], np.float32)[None, None, :, None], k.shape)
    np.testing.assert_allclose(attention(q, k, v)[0, -1, :, 0], [10, 10, 10, 20, 20, 20], rtol=1e-6)


def test_causality_by_gradients():
    """d out[l] / d (k, v)[m] is zero where m > l, or where the segments differ, and nowhere else."""
    q, k, v = inputs(6, 2, 1, 4, B=1)
    segments = np.array([[1, 1, 2, 2, 2, 3]])
    for ids in (None, segments):
        jacobians = jax.jacobian(lambda k, v, ids=ids: attention(q, k, v, ids).sum((0, 2, 3)), argnums=(0, 1))(k, v)
        allowed = np.tril(np.ones((6, 6), bool)) & (True if ids is None else segments == segments.T)
        for jacobian, needed in zip(jacobians, (allowed.sum(1)[:, None] > 1, True), strict=True):
            seen = np.abs(jacobian).sum((1, 3, 4)) > 1e-6  # a query that sees one key only does not depend on it
            assert np.array_equal(seen, allowed & needed)


@pytest.mark.parametrize('implementation', ['blockwise', 'splash'])
@pytest.mark.parametrize(('L', 'G', 'K'), [(256, 4, 64), (256, 2, 64), (32, 2, 8), (100, 4, 32), (201, 1, 24)])
@pytest.mark.parametrize('segmented', [False, True])
def test_kernels_are_the_reference(L, G, K, segmented, implementation):
    """Outputs and gradients, at lengths that are padded and head sizes that fill no lane."""
    arrays = inputs(L, 4, G, K)
    parts = [L * 2 // 5, L // 4, L - L * 2 // 5 - L // 4]
    segments = np.repeat([[1, 2, 3], [1, 2, 0]], parts, axis=1).astype(np.int32) if segmented else None
    expected = value_and_gradients(*arrays, segments, implementation='reference')
    found = value_and_gradients(*arrays, segments, implementation=implementation, interpret=True)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_padding_of_splash_is_small_and_leaves_large_blocks():
    for length in range(1, 10_000, 7):
        padded = _padded(length)
        assert padded % 128 == 0 and length <= padded < max(length + 128, 1.2 * length)
        assert all(block == padded or 384 <= block <= 1024 for block in [_largest_block(padded)])


@pytest.mark.parametrize(('L', 'G'), [(32, 4), (32, 2), (31, 2)])
@pytest.mark.parametrize('segmented', [False, True])
def test_cudnn_is_called_for_the_same_thing(L, G, segmented, monkeypatch):
    """The call for cuDNN, answered by XLA's implementation of the same function; an odd length is made even."""
    real, asked = jax.nn.dot_product_attention, []

    def answered_by_xla(query, *arguments, implementation, **options):
        asked.append((implementation, query.shape[1]))
        return real(query, *arguments, implementation='xla', **options)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', answered_by_xla)
    arrays = [array.astype(jnp.bfloat16) for array in inputs(L, 4, G, 16)]
    segments = np.repeat([[1, 2, 3], [1, 2, 0]], [10, 6, L - 16], axis=1).astype(np.int32) if segmented else None
    expected = value_and_gradients(*arrays, segments, implementation='reference')
    for ours, theirs in zip(value_and_gradients(*arrays, segments, implementation='cudnn'), expected, strict=True):
        np.testing.assert_allclose(ours.astype(np.float32), theirs.astype(np.float32), rtol=0.05, atol=0.05)
    assert asked == [('cudnn', 32)]


@pytest.mark.parametrize(('K', 'dtype'), [(16, np.float32), (12, jnp.bfloat16), (256, jnp.bfloat16)])
def test_what_cudnn_refuses_is_computed_in_blocks(K, dtype):
    arrays = [array.astype(dtype) for array in inputs(32, 4, 2, K)]
    np.testing.assert_array_equal(attention(*arrays, implementation='cudnn'), attention(*arrays, implementation='blockwise'))


def test_kernel_for_each_platform():
    assert [implementation_for(platform) for platform in ('cpu', 'gpu', 'cuda', 'tpu')] == [
        'blockwise',
        'cudnn',
        'cudnn',
        'splash',
    ]


def test_unknown_kernel():
    with pytest.raises(KeyError, match='fast'):
        attention(*inputs(4, 2, 2, 8), implementation='fast')


@pytest.mark.parametrize('devices', [1, 8])
def test_cached_and_new_are_the_whole(devices):
    """Keys in the cache and keys beside it give what the whole sequence gives; what lies beyond a length is never seen."""
    config = ModelConfig(vocab_size=64, dim=32, layers=1, heads=8, kv_heads=2, head_dim=8, hidden=32, context=16)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(4, 9, heads, 8)).astype(np.float32) for heads in (8, 2, 2))
    whole = attention(q, k, v)
    lengths, new = np.array([0, 3, 5, 2], np.int32), 4
    take = lambda x: np.stack([row[start : start + new] for row, start in zip(x, lengths, strict=True)])  # noqa: E731
    cached = [np.full((4, 2, 12, 8), 1e4, np.float32) for _ in 'kv']
    for full, cache in zip((k, v), cached, strict=True):
        for row, length in enumerate(lengths):
            cache[row, :, :length] = full[row, :length].swapaxes(0, 1)
    mesh = decoding_mesh(config, jax.devices()[:devices])
    order = np.array([2, 0, 3, 1]) if devices == 1 else np.arange(4)  # rows may lie elsewhere in the cache of their device
    slot = np.array([1, 3, 0, 2], np.int32) if devices == 1 else np.arange(4, dtype=np.int32) % (4 // shards(mesh))

    @jax.jit
    def run(q, k, v, cached_k, cached_v, lengths, slot):
        arrays = (reshard(q, 'BLHK'), *(reshard(x.swapaxes(1, 2), 'RGLK') for x in (k, v)))
        cache = (reshard(x, 'RGMK') for x in (cached_k, cached_v))
        out = attention_with_cache(
            *arrays, jnp.tril(jnp.ones((new, new), bool)), *cache, reshard(lengths, 'R'), reshard(slot, 'R')
        )
        return replicate(out)

    with jax.set_mesh(mesh):
        found = run(take(q), take(k), take(v), *(cache[order] for cache in cached), lengths, slot)
    np.testing.assert_allclose(found, take(np.asarray(whole)), rtol=0, atol=1e-5)
