"""Rotary position embedding, the halves rotated (Su et al.; paper p5).

Dimension j of a head pairs with j + K/2, as in Hugging Face's files; Meta's pair 2j with 2j + 1, and `convert` permutes them.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rope_table(positions: jax.Array, head_dim: int, theta: float = 10_000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles: positions [..., L] -> two arrays [..., L, K/2] float32."""
    # In numpy: programs may round a power differently, and its last bit turns a late position by a thousandth.
    frequencies = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angles = positions[..., None].astype(jnp.float32) * np.expand_dims(frequencies, tuple(range(positions.ndim)))
    # Without a barrier XLA computes them again for every head of every layer.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(x_BLHK: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates queries or keys by their positions, in float32; the result has the dtype of `x_BLHK`.

    `cos`, `sin`: [L, K/2] or [B, L, K/2] from `rope_table`.
    """
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = (table.reshape((*(1,) * (3 - table.ndim), *table.shape))[..., None, :] for table in (cos, sin))
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BLHK.dtype)
