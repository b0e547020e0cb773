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


def dpo_loss(policy: jax.Array, reference: jax.Array, beta: float, label_smoothing: float) -> jax.Array:
    """DPO's loss of each pair (Rafailov et al., 2023), nats: as a reward model whose score is β log π/π0 of an answer.

    Args:
      policy, reference: float32 [..., 2], log-probabilities of the chosen and the rejected answer, sums over their tokens.
      beta: How much a change of the policy counts.
      label_smoothing: Share of the pairs that are taken to be labelled the wrong way round (Mitchell, 2023).

    >>> round(float(dpo_loss(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0]), 0.5, 0.0)), 4)  # softplus(-1)
    0.3133
    """
    margin = beta * _gain(policy, reference)
    return (1 - label_smoothing) * jax.nn.softplus(-margin) + label_smoothing * jax.nn.softplus(margin)


def ipo_loss(policy: jax.Array, reference: jax.Array, lengths: jax.Array, beta: float) -> jax.Array:
    """IPO's loss of each pair (Azar et al., 2023): the squared distance of the mean gain of a token from 1 / 2β.

    Args:
      policy, reference: As of `dpo_loss`.
      lengths: [..., 2], tokens of each answer.
      beta: As β falls, the policy goes further.
    """
    lengths = jnp.maximum(lengths, 1)
    return (_gain(policy / lengths, reference / lengths) - 1 / (2 * beta)) ** 2


def _gain(policy: jax.Array, reference: jax.Array) -> jax.Array:
    change = policy - reference
    return change[..., 0] - change[..., 1]
