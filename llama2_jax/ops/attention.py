"""Causal grouped-query attention: one function, three kernels, chosen by platform.

  reference   plain einsums; any platform, and what the others are tested against
  splash      JAX's Pallas kernel for TPU, which skips the masked blocks; lengths are padded to its blocks (`_padded`)
  cudnn       cuDNN's fused kernel, on GPU; dtypes and head sizes that it refuses go to the reference (`_refused_by_cudnn`)

Query head h reads key head h // (H / G), as `repeat_interleave` does in Meta's code; scores are divided by sqrt(K) (recipe A.3).
"""

import itertools
import logging
from functools import cache, partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from llama2_jax.mesh import spec

Implementation = Literal['reference', 'blockwise', 'splash', 'cudnn']
ATTENTION_OUTPUT = 'attention'  # the name under which a remat policy saves it
CACHED_QUERIES = 256  # that look at a cache at a time, at least: more scores than theirs fit no CPU's cache


def implementation_for(platform: str) -> Implementation:
    """The kernel for a platform: 'cpu', 'gpu' (or 'cuda') or 'tpu'."""
    kernels: dict[str, Implementation] = {'tpu': 'splash', 'gpu': 'cudnn', 'cuda': 'cudnn'}
    return kernels.get(platform, 'blockwise')


def attention(
    q_BLHK: jax.Array,
    k_BLGK: jax.Array,
    v_BLGK: jax.Array,
    segments_BL: jax.Array | None = None,
    *,
    implementation: Implementation = 'blockwise',
    interpret: bool = False,
) -> jax.Array:
    """Each position attends to itself and to what came before; with `segments_BL` only within its own segment.

    Args:
      q_BLHK: queries, rotated.
      k_BLGK: keys, rotated; G divides H.
      v_BLGK: values.
      segments_BL: int32; positions of equal number see each other. None: everything before.
      implementation: The kernel: 'reference' is the definition in plain einsums, which the tests compare the others with;
        'blockwise' is for CPUs, 'splash' for TPUs, 'cudnn' for GPUs. Each takes any length and head size.
      interpret: runs splash's body step by step, for tests on a CPU.

    Returns:
      [B, L, H, K] in the dtype of the queries.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kernel = {
        'reference': _reference,
        'blockwise': _blockwise,
        'splash': partial(_splash, interpret=interpret),
        'cudnn': _cudnn,
    }[implementation]
    if mesh.empty:
        out = kernel(q_BLHK, k_BLGK, v_BLGK, segments_BL, segments_BL)
    else:
        # A shard holds some queries and, of its heads, every key: over a sequence axis keys and values are gathered.
        k_BMGK, v_BMGK = (jax.sharding.reshard(x, spec('BMGK')) for x in (k_BLGK, v_BLGK))
        segments_BM = None if segments_BL is None else jax.sharding.reshard(segments_BL, spec('BM'))
        segment_specs = (None, None) if segments_BL is None else (spec('BL'), spec('BM'))
        in_specs = (spec('BLHK'), spec('BMGK'), spec('BMGK'), *segment_specs)
        sharded = jax.shard_map(
            partial(kernel, shards=mesh.shape['sequence']), in_specs=in_specs, out_specs=spec('BLHK'), check_vma=False
        )
        out = sharded(q_BLHK, k_BMGK, v_BMGK, segments_BL, segments_BM)
    return out if implementation == 'splash' else checkpoint_name(out, ATTENTION_OUTPUT)  # splash names its own


def attention_with_cache(
    q_BLHK: jax.Array,
    k_RGLK: jax.Array,
    v_RGLK: jax.Array,
    visible_LL: jax.Array,
    cached_k_RGMK: jax.Array,
    cached_v_RGMK: jax.Array,
    length_R: jax.Array,
    slot_R: jax.Array | None = None,
) -> jax.Array:
    """New tokens attend to what the cache holds, and to new keys and values that are not in it yet; on a mesh for decoding.

    Every device works on its own rows and heads: queries, which are cut by heads alone, trade heads for rows first.

    Args:
      q_BLHK: queries, rotated by their positions.
      k_RGLK, v_RGLK: new keys, rotated, and values: of the same tokens, or of some before them too.
      visible_LL: bool, which of the new keys each query sees; or [R, L, L], where rows differ in that. Where there are as many
        keys as queries, none sees a later one.
      cached_k_RGMK, cached_v_RGMK: the cache.
      length_R: int32, how many places of its cache a row sees.
      slot_R: int32, the row of the cache (of the rows on this device) that belongs to each row; None: their own.

    Returns:
      [B, L, H, K] in the dtype of the queries.
    """
    new, cached, row = spec('RGLK'), spec('RGMK'), spec('R')
    visible = spec('RLL' if visible_LL.ndim == 3 else 'LL')
    in_specs = (spec('BLHK'), new, new, visible, cached, cached, row, None if slot_R is None else row)
    local = partial(_cached, shards=jax.sharding.get_abstract_mesh().shape['rows'])
    sharded = jax.shard_map(local, in_specs=in_specs, out_specs=spec('BLHK'), check_vma=False)
    return sharded(q_BLHK, k_RGLK, v_RGLK, visible_LL, cached_k_RGMK, cached_v_RGMK, length_R, slot_R)


def _cached(q_BLHK, k_RGLK, v_RGLK, visible_LL, cached_k_RGMK, cached_v_RGMK, length_R, slot_R, shards):
    if shards > 1:
        q_BLHK = jax.lax.all_to_all(q_BLHK, 'rows', split_axis=0, concat_axis=2, tiled=True)
    R, L, H, K = q_BLHK.shape
    G, M = cached_k_RGMK.shape[1:3]
    if slot_R is not None:
        cached_k_RGMK, cached_v_RGMK = cached_k_RGMK[slot_R], cached_v_RGMK[slot_R]
    q_RGPLK = (q_BLHK * K**-0.5).reshape(R, L, G, H // G, K).transpose(0, 2, 3, 1, 4)
    visible_RM = jnp.arange(M)[None] < length_R[:, None]
    visible_R11LL = visible_LL.reshape(-1, 1, 1, *visible_LL.shape[-2:])
    outs = []
    for rows, seen in _blocks(L, k_RGLK.shape[2], k_RGLK.shape[2] == L, CACHED_QUERIES):
        q = q_RGPLK[..., rows, :]
        scores = [
            _masked_scores(q, cached_k_RGMK, visible_RM[:, None, None, None]),
            _masked_scores(q, k_RGLK[:, :, seen], visible_R11LL[..., rows, seen]),
        ]
        # One softmax over both. A query sees itself at least, so the maximum is that of something visible.
        top = jnp.maximum(*(jnp.max(some, axis=-1, keepdims=True, initial=-jnp.inf) for some in scores))
        exps = [jnp.exp(some - top) for some in scores]
        total = exps[0].sum(axis=-1, keepdims=True) + exps[1].sum(axis=-1, keepdims=True)
        out = jnp.add(
            *(
                jnp.einsum('RGPLM,RGMK->RGPLK', some.astype(v.dtype), v, preferred_element_type=jnp.float32)
                for some, v in zip(exps, (cached_v_RGMK, v_RGLK[:, :, seen]), strict=True)
            )
        )
        outs.append((out / total).astype(v_RGLK.dtype))
    out_RLHK = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4).reshape(R, L, H, K)
    return jax.lax.all_to_all(out_RLHK, 'rows', split_axis=2, concat_axis=0, tiled=True) if shards > 1 else out_RLHK


def _masked_scores(q_RGPLK, k_RGMK, visible):
    scores = jnp.einsum('RGPLK,RGMK->RGPLM', q_RGPLK, k_RGMK, preferred_element_type=jnp.float32)
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _visible(length: int, keys: int, segments_BL: jax.Array | None, segments_BM: jax.Array | None, shards: int) -> jax.Array:
    """What each query of this shard may see: bool [1 or B, L, M]."""
    first = jax.lax.axis_index('sequence') * length if shards > 1 else 0
    visible = (first + jnp.arange(length)[:, None] >= jnp.arange(keys)[None, :])[None]
    if segments_BL is None or segments_BM is None:
        return visible
    return visible & (segments_BL[:, :, None] == segments_BM[:, None, :])


def _reference(q_BLHK, k_BMGK, v_BMGK, segments_BL, segments_BM, shards=1):
    """The definition: every query against every key."""
    B, L, H, K = q_BLHK.shape
    M, G = k_BMGK.shape[1:3]
    q_BLGRK = q_BLHK.reshape(B, L, G, H // G, K)
    scores_BGRLM = jnp.einsum('BLGRK,BMGK->BGRLM', q_BLGRK, k_BMGK, preferred_element_type=jnp.float32) * K**-0.5
    visible_BLM = _visible(L, M, segments_BL, segments_BM, shards)
    weights_BGRLM = jax.nn.softmax(scores_BGRLM, axis=-1, where=visible_BLM[:, None, None])
    return jnp.einsum('BGRLM,BMGK->BLGRK', weights_BGRLM.astype(v_BMGK.dtype), v_BMGK).reshape(B, L, H, K)


def _blockwise(q_BLHK, k_BMGK, v_BMGK, segments_BL, segments_BM, shards=1):
    B, L, H, K = q_BLHK.shape
    M, G = k_BMGK.shape[1:3]
    visible_BLM = _visible(L, M, segments_BL, segments_BM, shards)
    q_BGRLK = (q_BLHK * K**-0.5).reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4)
    out_BGRLK = _blocks_of_queries(q_BGRLK, k_BMGK.swapaxes(1, 2), v_BMGK.swapaxes(1, 2), visible_BLM, shards == 1)
    return out_BGRLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks_of_queries(q_BGRLK, k_BGMK, v_BGMK, visible_BLM, aligned):
    """Attention in blocks of queries, each with the keys it can see: half the work, and scores that stay in a CPU's cache.

    The backward pass makes the scores again; what XLA on CPU makes of softmax's own derivative is several times slower.
    `aligned`: query i is position i of the keys.
    """
    return _blocks_forward(q_BGRLK, k_BGMK, v_BGMK, visible_BLM, aligned)[0]


def _blocks(queries, keys, aligned, least=64):
    size = max(least, -(-queries // 8))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield slice(start, stop), slice(0, stop if aligned else keys)


def _scores(q_BGRLK, k_BGMK, visible_BLM):
    scores = jnp.einsum('BGRLK,BGMK->BGRLM', q_BGRLK, k_BGMK, preferred_element_type=jnp.float32)
    return jnp.where(visible_BLM[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _blocks_forward(q_BGRLK, k_BGMK, v_BGMK, visible_BLM, aligned):
    outs, logsums = [], []
    for rows, seen in _blocks(q_BGRLK.shape[3], k_BGMK.shape[2], aligned):
        scores = _scores(q_BGRLK[..., rows, :], k_BGMK[:, :, seen], visible_BLM[:, rows, seen])
        top = scores.max(axis=-1, keepdims=True)
        exps = jnp.exp(scores - top)
        total = exps.sum(axis=-1, keepdims=True)
        weights = (exps / total).astype(v_BGMK.dtype)
        outs.append(jnp.einsum('BGRLM,BGMK->BGRLK', weights, v_BGMK[:, :, seen]))
        logsums.append(top + jnp.log(total))
    out_BGRLK = jnp.concatenate(outs, axis=3)
    return out_BGRLK, (q_BGRLK, k_BGMK, v_BGMK, visible_BLM, out_BGRLK, jnp.concatenate(logsums, axis=3))


def _blocks_backward(aligned, residuals, dout_BGRLK):
    q_BGRLK, k_BGMK, v_BGMK, visible_BLM, out_BGRLK, logsum_BGRL1 = residuals
    product = out_BGRLK.astype(jnp.float32) * dout_BGRLK.astype(jnp.float32)
    delta_BGRL1 = product.sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros(k_BGMK.shape, jnp.float32), jnp.zeros(v_BGMK.shape, jnp.float32)
    for rows, seen in _blocks(q_BGRLK.shape[3], k_BGMK.shape[2], aligned):
        q, k, v, dout = q_BGRLK[..., rows, :], k_BGMK[:, :, seen], v_BGMK[:, :, seen], dout_BGRLK[..., rows, :]
        weights = jnp.exp(_scores(q, k, visible_BLM[:, rows, seen]) - logsum_BGRL1[..., rows, :])
        dweights = jnp.einsum('BGRLK,BGMK->BGRLM', dout, v, preferred_element_type=jnp.float32)
        dscores = (weights * (dweights - delta_BGRL1[..., rows, :])).astype(q.dtype)
        dq.append(jnp.einsum('BGRLM,BGMK->BGRLK', dscores, k))
        dk = dk.at[:, :, seen].add(jnp.einsum('BGRLM,BGRLK->BGMK', dscores, q))
        dv = dv.at[:, :, seen].add(jnp.einsum('BGRLM,BGRLK->BGMK', weights.astype(dout.dtype), dout))
    return jnp.concatenate(dq, axis=3), dk.astype(k_BGMK.dtype), dv.astype(v_BGMK.dtype), None


_blocks_of_queries.defvjp(_blocks_forward, _blocks_backward)


def _refused_by_cudnn(q_BLHK: jax.Array) -> str:
    """Why cuDNN's kernel cannot be used, or an empty string (limits of `jax.nn.dot_product_attention` on every GPU since Ampere).

    >>> _refused_by_cudnn(jnp.zeros((1, 8, 2, 12), jnp.bfloat16))
    'a head size of 12, which is not a multiple of 8 up to 128'
    """
    if q_BLHK.dtype not in (jnp.bfloat16, jnp.float16):
        return f'{q_BLHK.dtype}, which is neither bfloat16 nor float16'
    K = q_BLHK.shape[3]
    return f'a head size of {K}, which is not a multiple of 8 up to 128' if K % 8 or K > 128 else ''


@cache
def _warn_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)


def _cudnn(q_BLHK, k_BMGK, v_BMGK, segments_BL, segments_BM, shards=1):
    if why := _refused_by_cudnn(q_BLHK):
        _warn_once(f'Attention is computed without cuDNN, which does not support {why}.')
        return _blockwise(q_BLHK, k_BMGK, v_BMGK, segments_BL, segments_BM, shards)
    L, M = q_BLHK.shape[1], k_BMGK.shape[1]
    q_size, kv_size = L + L % 2, M + M % 2  # its backward pass takes even lengths only
    simple = segments_BL is None and shards == 1  # cuDNN then skips what the causal mask hides
    mask_B1LM = None
    if not simple:
        mask_BML = _pad(_visible(L, M, segments_BL, segments_BM, shards).swapaxes(1, 2), kv_size)  # False: nothing sees padding
        mask_B1LM = _pad(mask_BML.swapaxes(1, 2), q_size, 'edge')[:, None]
    qkv = _pad(q_BLHK, q_size), _pad(k_BMGK, kv_size), _pad(v_BMGK, kv_size)
    return jax.nn.dot_product_attention(*qkv, mask=mask_B1LM, is_causal=simple, implementation='cudnn')[:, :L]


def _pad(x, size, mode='constant'):
    """The array with `size` places on its second axis."""
    return jnp.pad(x, ((0, 0), (0, size - x.shape[1]), *[(0, 0)] * (x.ndim - 2)), mode)


def _splash(q_BLHK, k_BMGK, v_BMGK, segments_BL, segments_BM, shards=1, interpret=False):
    _, L, H, K = q_BLHK.shape
    q_size, kv_size = (_padded(size) for size in (L, k_BMGK.shape[1]))

    # Padding follows the real keys, so the causal mask hides it from real queries. Padded queries continue the last segment: they
    # see its last key, and no softmax is over nothing, whose gradients would not be finite. Their outputs are cut off.
    ids = (
        None if segments_BL is None else splash.SegmentIds(_pad(segments_BL, q_size, 'edge'), _pad(segments_BM, kv_size, 'edge'))
    )
    heads_first = [_pad(x, size).swapaxes(1, 2) for x, size in ((q_BLHK * K**-0.5, q_size), (k_BMGK, kv_size), (v_BMGK, kv_size))]

    def run(shard: int) -> jax.Array:
        mask = splash_mask.MultiHeadMask([splash_mask.CausalMask((q_size, kv_size), offset=shard * L)] * H)
        kernel = splash.make_splash_mha_single_device(
            mask, block_sizes=_block_sizes(q_size, kv_size), residual_checkpoint_name=ATTENTION_OUTPUT, interpret=interpret
        )
        return jax.vmap(kernel)(*heads_first, ids).swapaxes(1, 2)[:, :L]

    if shards == 1:
        return run(0)
    return jax.lax.switch(jax.lax.axis_index('sequence'), [partial(run, shard) for shard in range(shards)])


def _padded(length: int) -> int:
    """The length with which splash computes: a multiple of 128 (the lanes of a TPU) whose blocks are not small.

    Up to 1,024 tokens the next multiple of 128; beyond, at most 20 % more than the length. Attention alone pays for it.

    >>> [_padded(length) for length in (32, 112, 544, 1024, 2176, 4095, 4096)]
    [128, 128, 640, 1024, 2304, 4096, 4096]
    """
    return next(size for size in itertools.count(-(-length // 128) * 128, 128) if _largest_block(size) >= min(size, 384))


def _largest_block(size: int, limit: int = 1024) -> int:
    """The largest multiple of 128 up to the limit, which is what fits a core's vector memory, that divides the size."""
    return next(block for block in range(min(size, limit), 0, -128) if size % block == 0)


def _block_sizes(length: int, keys: int) -> splash.BlockSizes:
    q, kv = _largest_block(length), _largest_block(keys)
    compute = _largest_block(kv, 512)
    return splash.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=compute,
        block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
