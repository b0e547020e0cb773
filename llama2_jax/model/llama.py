"""The LLaMA 2 transformer (paper p5; recipe A).

One suffix is the name, the einsum, the sharding, the decay rule and the shape test of an array:

  B batch   L length   M key length   D model   H query heads   G key/value heads
  K head size   F feed-forward   V vocabulary   N layers

Parameters rest in float32, cut over the mesh (`mesh.PARAMETERS`); a layer casts its own to the compute dtype and gathers them
when its turn comes. Norms, softmax, rotations and losses are float32.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llama2_jax.config import ModelConfig, UserError, nearest, resumable
from llama2_jax.mesh import parameter_spec, reshard
from llama2_jax.ops.attention import ATTENTION_OUTPUT, Implementation, attention, implementation_for
from llama2_jax.ops.embedding import embed
from llama2_jax.ops.linear import linear
from llama2_jax.ops.loss import cross_entropy, log_probs
from llama2_jax.ops.rope import rope_table, rotate

# What a layer can keep for its backward pass besides its input, by the names given to `checkpoint_name`.
KEPT = ('q', 'k', 'v', ATTENTION_OUTPUT, 'gate', 'up')
Rope = tuple[jax.Array, jax.Array]  # cosines and sines, [L, K/2] or [B, L, K/2] float32


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How the forward pass is computed; none of it changes what is computed.

    Attributes:
      dtype: of activations and of parameters in use; auto: float32 on CPU, bfloat16 elsewhere.
      remat: what a layer keeps for its backward pass besides its input; the rest is computed again. none: everything is
        kept; full: nothing; or names of KEPT joined by '+', such as 'k+v+attention'; offload: q, k and v, in host memory.
      attention: the kernel; auto: the platform's.
    """

    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'
    remat: str = resumable('none')
    attention: Literal['auto', 'reference', 'blockwise', 'splash', 'cudnn'] = resumable('auto')

    def __post_init__(self) -> None:
        if self.remat not in ('none', 'full', 'offload'):
            for name in self.remat.split('+'):
                if name not in KEPT:
                    raise UserError(
                        f'remat {self.remat!r} is not none, full, offload or names joined by +; {nearest(name, KEPT)}'
                    )

    def on(self, platform: str) -> 'ComputeConfig':
        """With nothing left to choose, for 'cpu', 'gpu' or 'tpu'."""
        dtype = ('float32' if platform == 'cpu' else 'bfloat16') if self.dtype == 'auto' else self.dtype
        kernel = implementation_for(platform) if self.attention == 'auto' else self.attention
        return ComputeConfig(dtype, self.remat, kernel)

    @property
    def kernel(self) -> Implementation:
        """The attention kernel; only `on` resolves 'auto'."""
        if self.attention == 'auto':
            raise ValueError('ComputeConfig.on(platform) must choose the attention kernel first.')
        return self.attention


CPU = ComputeConfig().on('cpu')


def normal(key: jax.Array, name: str, shape: tuple[int, ...], fan_in: int, depth: int = 0) -> nnx.Param:
    """Truncated normals (at 3 sigma) of sigma fan_in^-1/2, over sqrt(2 depth) for what writes to the residual stream.

    Neither LLaMA paper states its initialisation; this is Meta lingua's (recipe K, choice c).
    """
    sigma = fan_in**-0.5 / (2 * depth) ** 0.5 if depth else fan_in**-0.5
    return nnx.Param(sigma * jax.random.truncated_normal(key, -3, 3, shape, jnp.float32, out_sharding=parameter_spec(name)))


def ones(size: int) -> nnx.Param:
    """A norm's scale: vectors are replicated."""
    return nnx.Param(jnp.ones(size, jnp.float32))


def rms_norm(x_BLD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) in float32, cast back to the dtype of x, then scaled (recipe A.3)."""
    x = x_BLD.astype(jnp.float32)
    x *= jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    # Behind a barrier as in `feed_forward`: without it XLA normalises again for every tile of the products that read this.
    return jax.lax.optimization_barrier(x.astype(x_BLD.dtype) * scale_D.astype(x_BLD.dtype)[None, None])


class Block(nnx.Module):
    """One pre-norm layer: attention, then SwiGLU, each added to the residual stream."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        D, H, G, K, F = config.dim, config.heads, config.kv_heads, config.head_dim, config.hidden
        q, k, v, o, gate, up, down = jax.random.split(key, 7)
        self.eps = config.norm_eps
        self.attention_norm_D = ones(D)
        self.w_q_DHK = normal(q, 'w_q_DHK', (D, H, K), D)
        self.w_k_DGK = normal(k, 'w_k_DGK', (D, G, K), D)
        self.w_v_DGK = normal(v, 'w_v_DGK', (D, G, K), D)
        self.w_o_DHK = normal(o, 'w_o_DHK', (D, H, K), H * K, config.layers)
        self.ffn_norm_D = ones(D)
        self.w_gate_DF = normal(gate, 'w_gate_DF', (D, F), D)
        self.w_up_DF = normal(up, 'w_up_DF', (D, F), D)
        self.w_down_DF = normal(down, 'w_down_DF', (D, F), F, config.layers)

    def __call__(self, x_BLD: jax.Array, rope: Rope, attend: Callable[..., jax.Array]) -> jax.Array:
        """[B, L, D] -> [B, L, D]; `attend` makes [B, L, H, K] of queries, keys and values."""
        out_BLHK = attend(*self.qkv(rms_norm(x_BLD, self.attention_norm_D[...], self.eps), rope))
        x_BLD = x_BLD + linear('BLHK,DHK->BLD', out_BLHK, self.w_o_DHK[...])
        return x_BLD + self.feed_forward(rms_norm(x_BLD, self.ffn_norm_D[...], self.eps))

    def qkv(self, x_BLD: jax.Array, rope: Rope) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries [B, L, H, K], rotated keys and values [B, L, G, K]."""
        q_BLHK = linear('BLD,DHK->BLHK', x_BLD, self.w_q_DHK[...])
        k_BLGK = linear('BLD,DGK->BLGK', x_BLD, self.w_k_DGK[...])
        v_BLGK = linear('BLD,DGK->BLGK', x_BLD, self.w_v_DGK[...])
        return (
            checkpoint_name(rotate(q_BLHK, *rope), 'q'),
            checkpoint_name(rotate(k_BLGK, *rope), 'k'),
            checkpoint_name(v_BLGK, 'v'),
        )

    def feed_forward(self, x_BLD: jax.Array) -> jax.Array:
        """SwiGLU: down(silu(gate x) * up x)."""
        gate_BLF = checkpoint_name(linear('BLD,DF->BLF', x_BLD, self.w_gate_DF[...]), 'gate')
        up_BLF = checkpoint_name(linear('BLD,DF->BLF', x_BLD, self.w_up_DF[...]), 'up')
        # Without barriers XLA computes these products and their gradients again inside every matrix product that reads them.
        gate_BLF, up_BLF = jax.lax.optimization_barrier((gate_BLF, up_BLF))
        hidden_BLF = jax.lax.optimization_barrier(jax.nn.silu(gate_BLF) * up_BLF)
        return linear('BLF,DF->BLD', hidden_BLF, self.w_down_DF[...])


class Transformer(nnx.Module):
    """Embedding, N equal layers held as one stacked `Block`, final norm (recipe A.3): all but a head."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        V, D = config.vocab_size, config.dim
        table, _, blocks = jax.random.split(key, 3)
        self.config = config
        self.table_VD = normal(table, 'table_VD', (V, D), D)
        self.blocks = jax.vmap(partial(Block, config))(jax.random.split(blocks, config.layers))
        self.norm_D = ones(D)

    def __call__(self, tokens_BL: jax.Array, segments_BL: jax.Array | None = None, compute: ComputeConfig = CPU) -> jax.Array:
        """Hidden states after the final norm.

        Args:
          tokens_BL: int32 ids.
          segments_BL: int32 document numbers; positions then restart in each and attention stays inside. None: one document.
          compute: how.

        Returns:
          [B, L, D] in the compute dtype; a head takes it from there.
        """
        rope = rope_table(positions(tokens_BL, segments_BL), self.config.head_dim, self.config.rope_theta)

        def attend(*qkv):  # causal, over the sequence itself
            return attention(*qkv, segments_BL, implementation=compute.kernel)

        def layer(x_BLD, block):
            return block(x_BLD, rope, attend), None

        x_BLD = embed(self.table_VD[...], tokens_BL, compute.dtype)
        x_BLD, _ = jax.lax.scan(rematerialised(layer, compute.remat), x_BLD, self.blocks)
        return rms_norm(x_BLD, self.norm_D[...], self.config.norm_eps)


class Llama(Transformer):
    """The language model: the trunk, and an output embedding of its own."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        super().__init__(config, key)
        _, head, _ = jax.random.split(key, 3)
        self.head_DV = normal(head, 'head_DV', (config.dim, config.vocab_size), config.dim)

    def logits(self, x_BLD: jax.Array) -> jax.Array:
        """Scores of every next token, [B, L, V] float32: for looking; training uses `loss`."""
        return linear('BLD,DV->BLV', x_BLD, self.head_DV[...]).astype(jnp.float32)

    def loss(self, x_BLD: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array) -> jax.Array:
        """Weighted sum of the next-token losses, nats (see `ops.loss`)."""
        return cross_entropy(x_BLD, self.head_DV[...], targets_BL, weights_BL)

    def log_probs(self, x_BLD: jax.Array, targets_BL: jax.Array, temperature: float) -> tuple[jax.Array, jax.Array]:
        """Log-probability of each target, and the entropy there (see `ops.loss`)."""
        return log_probs(x_BLD, self.head_DV[...], targets_BL, temperature)


def positions(tokens_BL: jax.Array, segments_BL: jax.Array | None) -> jax.Array:
    """Position of each token: [L], or [B, L] counted from the start of its segment.

    >>> positions(jnp.zeros((1, 5)), jnp.array([[1, 1, 2, 2, 2]])).tolist()
    [[0, 1, 0, 1, 2]]
    """
    index_L = jnp.arange(tokens_BL.shape[1])
    if segments_BL is None:
        return index_L
    segments_BM = reshard(segments_BL, 'BM')  # a segment may have begun in another shard of the length
    starts_BM = jnp.pad(segments_BM[:, 1:] != segments_BM[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return reshard(index_L[None] - jax.lax.cummax(jnp.where(starts_BM, index_L[None], 0), axis=1), 'BL')


def rematerialised(layer, remat: str):
    """The layer under `jax.checkpoint`, keeping what `remat` names."""
    policies = jax.checkpoint_policies
    if remat == 'none':
        return layer
    if remat == 'offload':
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list('qkv'), offload_src='device', offload_dst='pinned_host'
        )
    else:
        policy = policies.save_only_these_names(*([] if remat == 'full' else remat.split('+')))
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
