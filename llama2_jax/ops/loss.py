"""Next-token cross-entropy and log-probabilities over a large vocabulary, without the logits.

The whole [B, L, V] would be the largest array of a training step by far. So tokens go through in blocks: each block's logits
give its loss and, because a sum of losses has gradients that need nothing from later, its gradients at once. Nothing is kept or
computed twice: a training step multiplies by the head three times (logits, their two gradients), not four. Only where a gradient
has to wait for what becomes of the log-probabilities (`log_probs`, for PPO) are the logits computed again.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama2_jax.mesh import DATA_AXES, parameter_spec, spec

BLOCK_BYTES = 1 << 27  # of float32 logits alive at once, per device


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def cross_entropy(
    x_BLD: jax.Array, head_DV: jax.Array, targets_BL: jax.Array, weights_BL: jax.Array, block: int | None = None
) -> jax.Array:
    """Sum over tokens of weight × -log softmax(x · head)[target], float32 nats; divide by the global weight for a mean.

    Args:
      x_BLD: last hidden states, in the compute dtype.
      head_DV: output embedding at rest: its own dtype and sharding; used in the dtype of `x_BLD`.
      targets_BL: int32 token ids.
      weights_BL: float32, 0 where nothing is to be learnt.
      block: tokens a block; None: as many as keep the logits under BLOCK_BYTES.
    """
    return _sharded('loss', x_BLD, head_DV, targets_BL, weights_BL, block=block)


def _forward(x_BLD, head_DV, targets_BL, weights_BL, block):
    loss, dx_BLD, dhead_DV = _sharded('gradients', x_BLD, head_DV, targets_BL, weights_BL, block=block)
    return loss, (dx_BLD, dhead_DV)


def _backward(block, gradients, cotangent):
    dx_BLD, dhead_DV = gradients
    return (cotangent * dx_BLD).astype(dx_BLD.dtype), cotangent * dhead_DV, None, None


cross_entropy.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def log_probs(
    x_BLD: jax.Array, head_DV: jax.Array, targets_BL: jax.Array, temperature: float = 1.0, block: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, and entropy of the distribution that it was drawn from; float32 [B, L] nats.

    Arguments are those of `cross_entropy`; the distribution is softmax(x · head / temperature). The entropy is for looking: no
    gradient flows through it.
    """
    return _sharded('tokens', x_BLD, head_DV, targets_BL, jnp.zeros_like(targets_BL, jnp.float32), temperature, block)


def _tokens_forward(x_BLD, head_DV, targets_BL, temperature, block):
    return log_probs(x_BLD, head_DV, targets_BL, temperature, block), (x_BLD, head_DV, targets_BL)


def _tokens_backward(temperature, block, residuals, cotangents):
    """The gradient of a sum of log-probabilities is that of a cross-entropy with the cotangents as weights."""
    x_BLD, head_DV, targets_BL = residuals
    _, dx_BLD, dhead_DV = _sharded('gradients', x_BLD, head_DV, targets_BL, -cotangents[0], temperature, block)
    return dx_BLD, dhead_DV.astype(head_DV.dtype), None


log_probs.defvjp(_tokens_forward, _tokens_backward)


def _sharded(wanted, x_BLD, head_DV, targets_BL, weights_BL, temperature=1.0, block=None):
    local = partial(_local, wanted=wanted, temperature=temperature, block=block)
    head_spec = parameter_spec('head_DV')
    if head_spec is None:
        return local(x_BLD, head_DV, targets_BL, weights_BL, axes=None)
    out_specs = {'loss': P(), 'gradients': (P(), spec('BLD'), head_spec), 'tokens': (spec('BL'),) * 2}[wanted]
    sharded = jax.shard_map(
        partial(local, axes=head_spec[0]),
        in_specs=(spec('BLD'), head_spec, spec('BL'), spec('BL')),
        out_specs=out_specs,
        check_vma=False,
    )
    return sharded(x_BLD, head_DV, targets_BL, weights_BL)


def _local(x_BLD, head_DV, targets_BL, weights_BL, *, wanted, temperature, block, axes):
    """One device's tokens against its part of the vocabulary; `axes` cut the head's D, None: no mesh."""
    with_gradients = wanted == 'gradients'
    x_TD, targets_T, weights_T = x_BLD.reshape(-1, x_BLD.shape[-1]), targets_BL.reshape(-1), weights_BL.reshape(-1)
    head_DV = head_DV.astype(x_TD.dtype)
    if axes is not None:
        head_DV = jax.lax.all_gather(head_DV, axes, axis=0, tiled=True)
    first = jax.lax.axis_index('tensor') * head_DV.shape[1] if axes is not None else 0
    tensor_sum = partial(jax.lax.psum, axis_name='tensor') if axes is not None else lambda x: x
    tensor_max = partial(jax.lax.pmax, axis_name='tensor') if axes is not None else lambda x: x

    T = x_TD.shape[0]
    block = min(T, block or max(BLOCK_BYTES // (4 * head_DV.shape[1]), 1))
    blocks = -(-T // block)
    padded = [jnp.pad(a, ((0, blocks * block - T), *((0, 0),) * (a.ndim - 1))) for a in (x_TD, targets_T, weights_T)]
    padded = [a.reshape(blocks, block, *a.shape[1:]) for a in padded]

    def one_block(carry, inputs):
        loss, dhead_DV = carry
        x_TD, targets_T, weights_T = inputs
        logits_TV = jnp.dot(x_TD, head_DV, preferred_element_type=jnp.float32) / temperature
        hit_TV = jnp.arange(logits_TV.shape[1])[None, :] == (targets_T - first)[:, None]
        top_T = tensor_max(logits_TV.max(axis=1))
        exps_TV = jnp.exp(logits_TV - top_T[:, None])
        sums_T = tensor_sum(exps_TV.sum(axis=1))
        target_T = tensor_sum(jnp.where(hit_TV, logits_TV, 0).sum(axis=1))
        whole_T = jnp.log(sums_T) + top_T
        if wanted == 'tokens':
            mean_T = tensor_sum((exps_TV * logits_TV).sum(axis=1)) / sums_T
            return (loss, dhead_DV), (target_T - whole_T, whole_T - mean_T)
        loss += jnp.sum(weights_T * (whole_T - target_T))
        if not with_gradients:
            return (loss, dhead_DV), None
        dlogits_TV = exps_TV * (weights_T / sums_T)[:, None] - jnp.where(hit_TV, weights_T[:, None], 0)
        dlogits_TV = (dlogits_TV / temperature).astype(x_TD.dtype)
        dhead_DV += jnp.dot(x_TD.T, dlogits_TV, preferred_element_type=jnp.float32)
        return (loss, dhead_DV), jnp.dot(dlogits_TV, head_DV.T)

    dhead_DV = jnp.zeros(head_DV.shape if with_gradients else (), jnp.float32)
    (loss, dhead_DV), of_tokens = jax.lax.scan(one_block, (jnp.zeros((), jnp.float32), dhead_DV), tuple(padded))
    if wanted == 'tokens':
        return tuple(x.reshape(-1)[:T].reshape(targets_BL.shape) for x in of_tokens)
    loss = loss if axes is None else jax.lax.psum(loss, DATA_AXES)
    if not with_gradients:
        return loss
    dx_BLD = tensor_sum(of_tokens.reshape(blocks * block, -1)[:T]).reshape(x_BLD.shape)
    if axes is not None:
        dhead_DV = jax.lax.psum(
            dhead_DV.astype(x_TD.dtype), 'replica'
        )  # added up over devices in the compute dtype, like all gradients
        dhead_DV = jax.lax.psum_scatter(dhead_DV, axes, scatter_dimension=0, tiled=True).astype(jnp.float32)
    return loss, dx_BLD, dhead_DV
