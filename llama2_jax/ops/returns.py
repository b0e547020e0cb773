"""What becomes of scores: one reward of two models, whitened, less the divergence; advantages; the clipped losses (paper p15-16).

Arrays are float32. In [B, L] position j stands for the choice of one token: its log-probability, what it earns, and the value of
the state that it was chosen in. `mask_BL` is 1 where that token belongs to the answer, 0 in the prompt and the padding; an
answer's tokens lie together. Masks come from lengths, so EOS and padding may share an id. L is not cut over a mesh.
"""

import math

import jax
import jax.numpy as jnp

EPSILON = 1e-8  # beside a variance


def gate(helpfulness_B: jax.Array, safety_B: jax.Array, is_safety_B: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """R_c before whitening (recipe F.3): safety's score for a tagged prompt or an answer that looks unsafe, else helpfulness'.

    The paper's scores are sigmoids, and LOGIT takes the sigmoid away again. Here it never was, so nothing saturates.

    Args:
      helpfulness_B, safety_B: linear scores.
      is_safety_B: bool, the tag.
      threshold: of the sigmoid of the safety score; the paper's is 0.15.

    Returns:
      The linear score that counts, and whether it is safety's.

    >>> gate(*map(jnp.array, ([3.0, 3.0, 3.0], [-2.0, -1.7, -1.7], [False, False, True])), 0.15)[1].tolist()
    [True, False, True]
    """
    gated_B = is_safety_B | (safety_B < math.log(threshold / (1 - threshold)))
    return jnp.where(gated_B, safety_B, helpfulness_B), gated_B


def whiten(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-8) over what the mask has, 0 elsewhere; the variance divides by the count itself.

    >>> whiten(jnp.array([1.0, 3.0, 9.0]), jnp.array([1.0, 1.0, 0.0])).tolist()
    [-1.0, 1.0, 0.0]
    """
    mask = jnp.ones_like(x) if mask is None else mask
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return mask * (x - mean) * jax.lax.rsqrt(variance + EPSILON)


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over what the mask has; 0 where that is nothing."""
    return (x * mask).sum() / jnp.maximum(mask.sum(), 1)


def k1(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """log π/π0 of drawn tokens: an unbiased estimate of KL(π‖π0), and what the reward pays; single ones may be negative."""
    return logprob - reference


def k3(logprob: jax.Array, reference: jax.Array) -> jax.Array:
    """π0/π - 1 - log π0/π of drawn tokens: unbiased too, never negative and of lower variance, so better to look at."""
    return jnp.exp(reference - logprob) - 1 - (reference - logprob)


def token_rewards(score_B: jax.Array, kl_BL: jax.Array, mask_BL: jax.Array, beta: jax.Array) -> jax.Array:
    """-β KL at every token of an answer, and its score at the last one.

    >>> token_rewards(jnp.array([2.0]), jnp.array([[9.0, 1.0, 3.0, 9.0]]), jnp.array([[0.0, 1.0, 1.0, 0.0]]), 0.5).tolist()
    [[0.0, -0.5, 0.5, 0.0]]
    """
    last_BL = mask_BL * (1 - _following(mask_BL))
    return last_BL * score_B[:, None] - beta * kl_BL * mask_BL


def advantages(
    reward_BL: jax.Array, value_BL: jax.Array, mask_BL: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al., 2016), and the returns that values are to become.

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γλ A_{t+1}; an answer ends with its last token, after which both are 0.

    Returns:
      Advantages and advantages + values, 0 outside the answers.
    """
    later_BL = _following(mask_BL)
    delta_BL = reward_BL + gamma * later_BL * _following(value_BL) - value_BL

    def step(advantage_B, column):
        delta_B, later_B, mask_B = column
        advantage_B = mask_B * (delta_B + gamma * lam * later_B * advantage_B)
        return advantage_B, advantage_B

    columns = tuple(x.swapaxes(0, 1) for x in (delta_BL, later_BL, mask_BL))
    _, advantage_LB = jax.lax.scan(step, jnp.zeros_like(reward_BL[:, 0]), columns, reverse=True)
    advantage_BL = advantage_LB.swapaxes(0, 1)
    return advantage_BL, mask_BL * (advantage_BL + value_BL)


def group_advantages(reward: jax.Array, scaled: bool) -> jax.Array:
    """How much better an answer is than others to its prompt, which takes no value model.

    Args:
      reward: [prompts, samples], what each whole answer earns.
      scaled: divides the distance from the mean by the group's standard deviation, as GRPO does (Shao et al., 2024). Otherwise it
        is the distance from the mean of the others: RLOO (Kool et al., 2019).

    >>> group_advantages(jnp.array([[1.0, 3.0], [5.0, 9.0]]), scaled=False).tolist()
    [[-2.0, 2.0], [-4.0, 4.0]]
    """
    apart = reward - reward.mean(axis=-1, keepdims=True)
    if scaled:
        return apart * jax.lax.rsqrt((apart**2).mean(axis=-1, keepdims=True) + EPSILON)
    return apart * reward.shape[-1] / (reward.shape[-1] - 1)


def _following(x_BL: jax.Array) -> jax.Array:
    """What the next position has; 0 after the last."""
    return jnp.pad(x_BL[:, 1:], ((0, 0), (0, 1)))


def policy_loss(logprob: jax.Array, old: jax.Array, advantage: jax.Array, clip: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """PPO's clipped objective (Schulman et al., 2017), negated, of each token.

    Returns:
      max(-A ρ, -A clip(ρ, 1 ± clip)), the ratio ρ = π / π_old, and 1.0 where clipping took the gradient away.
    """
    ratio = jnp.exp(logprob - old)
    plain, clipped = -advantage * ratio, -advantage * jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.maximum(plain, clipped), ratio, (clipped > plain).astype(jnp.float32)


def value_loss(value: jax.Array, old: jax.Array, target: jax.Array, clip: float) -> tuple[jax.Array, jax.Array]:
    """Half the squared error of each value, the larger of it and of the value kept within ± clip of the old one.

    Returns:
      The loss, and 1.0 where clipping took the gradient away.
    """
    plain = (value - target) ** 2
    clipped = (jnp.clip(value, old - clip, old + clip) - target) ** 2
    return 0.5 * jnp.maximum(plain, clipped), (clipped > plain).astype(jnp.float32)
