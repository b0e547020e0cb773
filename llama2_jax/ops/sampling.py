"""From scores to the next token: every row by its own settings and its own random number."""

import jax
import jax.numpy as jnp

BLOCK = 128  # of the vocabulary: a token is looked up by its block first


def sample(
    logits_BV: jax.Array, uniform_B: jax.Array, temperature_B: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Draws a token a row from softmax(logits / temperature), cut to the best k, then to the nucleus of what is left.

    Args:
      logits_BV: float32; finite.
      uniform_B: float32 in [0, 1), the random numbers.
      temperature_B: float32; 0 takes the best token.
      top_p_B: float32; see `nucleus`.
      top_k_B: int32; 0: no limit.

    Returns:
      int32 tokens [B], and their log-probabilities [B] float32 at this temperature (at 1, where it is 0) before anything
      was cut: what PPO compares a policy with.
    """
    greedy_B = temperature_B <= 0
    scale_B = 1 / jnp.where(greedy_B, 1, temperature_B)
    best_B, top_B = _argmax(logits_BV)

    def draw(logits_BV):
        cut_BV = logits_BV * scale_B[:, None]
        cut_BV = jax.lax.cond(jnp.any((top_k_B > 0) & ~greedy_B), best, lambda x_BV, k_B: x_BV, cut_BV, top_k_B)
        cut_BV = jax.lax.cond(jnp.any((top_p_B < 1) & ~greedy_B), nucleus, lambda x_BV, p_B: x_BV, cut_BV, top_p_B)
        return jnp.where(greedy_B, best_B, inverse_cdf(cut_BV, uniform_B))

    token_B = jax.lax.cond(jnp.all(greedy_B), lambda _: best_B, draw, logits_BV)
    rest_B = jnp.log(jnp.sum(jnp.exp((logits_BV - top_B[:, None]) * scale_B[:, None]), axis=-1))
    below_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0] - top_B
    return token_B, below_B * scale_B - rest_B


def best(logits_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    """The logits with -inf for all but the k best of a row; k = 0 drops nothing.

    >>> best(jnp.array([[1.0, 3.0, 2.0]]), jnp.array([2])).tolist()
    [[-inf, 3.0, 2.0]]
    """
    limit_B = jnp.where(top_k_B > 0, top_k_B - 1, logits_BV.shape[-1])
    return _drop(logits_BV, jnp.ones_like(logits_BV), limit_B.astype(jnp.float32))


def nucleus(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """The logits with -inf for a token where more likely ones have more than `top_p` of the probability.

    So the one that crosses stays (Meta's rule, recipe J). Equally likely tokens stay or go together.

    >>> nucleus(jnp.log(jnp.array([[0.5, 0.2, 0.3]])), jnp.array([0.5])).round(2).tolist()
    [[-0.69, -inf, -1.2]]
    """
    return _drop(logits_BV, jax.nn.softmax(logits_BV, axis=-1), jnp.where(top_p_B < 1, top_p_B, jnp.inf))


def _drop(logits_BV, weights_BV, limit_B):
    """Drops what has more than `limit_B` of the weights above it.

    The lowest logit that stays is found by bisection: a sort of the vocabulary takes twenty times as long.
    """
    bits_BV = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV)  # integers in the order of the floats

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean without overflow
        above_B = jnp.sum(jnp.where(order_BV > middle_B[:, None], weights_BV, 0), axis=-1)
        return jnp.where(above_B > limit_B, middle_B + 1, low_B), jnp.where(above_B > limit_B, high_B, middle_B)

    lowest_B, _ = jax.lax.fori_loop(0, 32, halve, (order_BV.min(axis=-1), order_BV.max(axis=-1)))
    return jnp.where(order_BV >= lowest_B[:, None], logits_BV, -jnp.inf)


def inverse_cdf(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """The token at which the cumulated probability of its row passes the row's number in [0, 1): int32 [B]."""
    weights_BV = jnp.exp(logits_BV - logits_BV.max(axis=-1, keepdims=True))
    # Sums of blocks first, then within one block: a tenth of the work of one long cumulated sum, and rounded less.
    blocks_BNI = _blocks(weights_BV, 0)
    sums_BN = blocks_BNI.sum(axis=-1)
    block_B, rest_B = _passing(sums_BN, uniform_B * sums_BN.sum(axis=-1))
    within_B, _ = _passing(_block(blocks_BNI, block_B), rest_B)
    return (block_B * BLOCK + within_B).astype(jnp.int32)


def _argmax(logits_BV):
    """The best token of each row, the first among equals, and its logit: in one pass, where XLA on CPU makes two and more."""
    blocks_BNI = _blocks(logits_BV, -jnp.inf)
    tops_BN = blocks_BNI.max(axis=-1)
    block_B = jnp.argmax(tops_BN, axis=-1)
    within_B = jnp.argmax(_block(blocks_BNI, block_B), axis=-1)
    return (block_B * BLOCK + within_B).astype(jnp.int32), tops_BN.max(axis=-1)


def _blocks(x_BV, padding):
    B, V = x_BV.shape
    return jnp.pad(x_BV, ((0, 0), (0, -V % BLOCK)), constant_values=padding).reshape(B, -1, BLOCK)


def _block(x_BNI, block_B):
    return jnp.take_along_axis(x_BNI, block_B[:, None, None], axis=1)[:, 0]


def _passing(weights_BI, target_B):
    """Where the cumulated weights pass the target, never at a weight of zero, and how far before that the target is."""
    sums_BI = jnp.cumsum(weights_BI, axis=-1)
    target_B = jnp.clip(target_B, 0, sums_BI[:, -1] * (1 - 2**-23))  # rounding must not carry it past the end
    index_B = jnp.argmax(sums_BI > target_B[:, None], axis=-1)
    before_B = jnp.take_along_axis(sums_BI - weights_BI, index_B[:, None], axis=-1)[:, 0]
    return index_B, target_B - before_B
