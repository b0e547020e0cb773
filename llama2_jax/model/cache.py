"""Keys and values of what was read already, and the forward pass that continues from them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llama2_jax.config import ModelConfig
from llama2_jax.mesh import spec
from llama2_jax.model.llama import Block, Llama, rms_norm
from llama2_jax.ops.attention import attention_with_cache
from llama2_jax.ops.embedding import embed
from llama2_jax.ops.rope import rope_table


class Cache(NamedTuple):
    """What attention looks back on.

    Attributes:
      k_NBMGK, v_NBMGK: rotated keys, and values, of M places a row, in the compute dtype.
      length_B: int32, places a row has filled. What lies beyond is never read, and written over by what comes next.
    """

    k_NBMGK: jax.Array
    v_NBMGK: jax.Array
    length_B: jax.Array


def empty_cache(config: ModelConfig, rows: int, places: int, dtype: str) -> Cache:
    """A cache for `rows` sequences of up to `places` tokens; 2 × N × G × K × 2 bytes a token in bfloat16 (recipe A.2)."""
    shape = (config.layers, rows, places, config.kv_heads, config.head_dim)
    zeros = jnp.zeros(shape, dtype, out_sharding=spec('NBMGK'))
    return Cache(zeros, zeros, jnp.zeros(rows, jnp.int32, out_sharding=spec('B')))


def extend(model: Llama, tokens_BL: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """Reads L more tokens in each row.

    Args:
      model: parameters.
      tokens_BL: int32; rows of different length are padded on the right with any id, and the caller then sets `length_B`.
      cache: what came before; its dtype is the compute dtype.

    Returns:
      Hidden states after the final norm, [B, L, D], and the longer cache.
    """
    config = model.config
    positions_BL = cache.length_B[:, None] + jnp.arange(tokens_BL.shape[1])[None]
    rope = rope_table(positions_BL, config.head_dim, config.rope_theta)

    def layer(x_BLD, inputs):
        block, k_BMGK, v_BMGK = inputs
        x_BLD, k_BMGK, v_BMGK = _extend_block(block, x_BLD, rope, cache.length_B, k_BMGK, v_BMGK)
        return x_BLD, (k_BMGK, v_BMGK)

    x_BLD = embed(model.table_VD[...], tokens_BL, cache.k_NBMGK.dtype.name)
    x_BLD, (k_NBMGK, v_NBMGK) = jax.lax.scan(layer, x_BLD, (model.blocks, cache.k_NBMGK, cache.v_NBMGK))
    longer = Cache(k_NBMGK, v_NBMGK, cache.length_B + tokens_BL.shape[1])
    return rms_norm(x_BLD, model.norm_D[...], config.norm_eps), longer


def _extend_block(block: Block, x_BLD, rope, start_B, k_BMGK, v_BMGK):
    q_BLHK, k_BLGK, v_BLGK = block.qkv(rms_norm(x_BLD, block.attention_norm_D[...], block.eps), rope)
    out_BLHK, k_BMGK, v_BMGK = attention_with_cache(q_BLHK, k_BLGK, v_BLGK, start_B, k_BMGK, v_BMGK)
    x_BLD = x_BLD + block.output(out_BLHK)
    return x_BLD + block.feed_forward(rms_norm(x_BLD, block.ffn_norm_D[...], block.eps)), k_BMGK, v_BMGK
