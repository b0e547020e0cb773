"""From scores to the next token."""

import jax
import jax.numpy as jnp


def sample(logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws a token a row: softmax(logits / temperature), cut to its nucleus; temperature 0 takes the best.

    A token is dropped where the probability before it exceeds `top_p`: the one that crosses stays (Meta's rule, recipe J).

    Args:
      logits_BV: float32.
      key: a random key.
      temperature, top_p: float32 scalars.

    Returns:
      int32 [B].
    """
    scaled_BV = logits_BV / jnp.maximum(temperature, 1e-6)
    drawn_B = jax.random.categorical(key, nucleus(scaled_BV, top_p))
    return jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def nucleus(logits_BV: jax.Array, top_p: jax.Array) -> jax.Array:
    """The logits with -inf for what top-p drops.

    >>> nucleus(jnp.log(jnp.array([[0.5, 0.2, 0.3]])), 0.5).round(2).tolist()
    [[-0.69, -inf, -1.2]]
    """
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    dropped_BV = jnp.take_along_axis(before_BV > top_p, jnp.argsort(order_BV, axis=-1), axis=-1)
    return jnp.where(dropped_BV, -jnp.inf, logits_BV)
