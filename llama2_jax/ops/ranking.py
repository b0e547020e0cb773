"""Losses on pairs of scores (paper p11; recipe E.3)."""

import jax
import jax.numpy as jnp

# By how much the chosen answer's score is to be above the other's: for unrated pairs, of which nobody said anything, and those
# rated negligibly, slightly, better and significantly (p52 Table 27).
MARGINS = {
    'none': (0.0, 0.0, 0.0, 0.0, 0.0),
    'small': (0.0, 0.0, 1 / 3, 2 / 3, 1.0),
    'large': (0.0, 0.0, 1.0, 2.0, 3.0),
}


def ranking_loss(scores: jax.Array, rating: jax.Array, margin: str) -> jax.Array:
    """-log sigmoid(chosen - rejected - margin) of each pair, nats.

    Args:
      scores: float32 [..., 2], chosen and rejected.
      rating: int32 [...], 0 for none, up to 4.
      margin: a name of MARGINS.
    """
    wanted = sum(size * (rating == number) for number, size in enumerate(MARGINS[margin]))
    return jax.nn.softplus(wanted - (scores[..., 0] - scores[..., 1]))


def safety_loss(scores: jax.Array, safe: jax.Array) -> jax.Array:
    """Binary cross-entropy of sigmoid(score) against being safe, the mean over a pair's two answers; nats.

    The paper names an auxiliary loss and prints no formula. This one makes a score of 0, a sigmoid of 0.5, the border between
    safe and unsafe, at which the paper counts (p53 Table 29).

    Args:
      scores: float32 [..., 2].
      safe: int32 [..., 2], 1, 0, or -1 where nobody said: that answer's part is 0.
    """
    losses = jnp.where(safe < 0, 0.0, jax.nn.softplus(jnp.where(safe > 0, -scores, scores)))
    return losses.sum(axis=-1) / 2
