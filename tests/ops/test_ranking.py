"""Losses on pairs of scores, by hand and as torch has them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.ops.ranking import MARGINS, ranking_loss, safety_loss


def test_by_hand():
    scores = jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [1.0, 0.0], [1.0, 0.0]])
    rating = jnp.array([0, 1, 2, 3, 4])  # unrated, negligibly, slightly, better, significantly
    log1p = math.log1p
    for margin, (slightly, better, significantly) in {
        'none': (0, 0, 0), 'small': (1 / 3, 2 / 3, 1), 'large': (1, 2, 3)
    }.items():  # fmt: skip
        expected = [
            log1p(math.exp(-1)), log1p(math.exp(2)), log1p(math.exp(slightly)),
            log1p(math.exp(better - 1)), log1p(math.exp(significantly - 1)),
        ]  # fmt: skip
        np.testing.assert_allclose(ranking_loss(scores, rating, margin), expected, rtol=1e-6)
        assert MARGINS[margin][0] == 0  # an unrated pair asks for no margin
    safe = jnp.array([[1, 0], [1, 1], [0, 0], [-1, 0], [-1, -1]])
    expected = [
        (log1p(math.exp(-1)) + log1p(1)) / 2, (log1p(1) + log1p(math.exp(-2))) / 2, log1p(math.exp(3)), log1p(1) / 2, 0,
    ]  # fmt: skip
    np.testing.assert_allclose(safety_loss(scores, safe), expected, rtol=1e-6)


def test_torch():
    torch = pytest.importorskip('torch')
    draw = np.random.default_rng(0)
    scores = (4 * draw.normal(size=(64, 2))).astype(np.float32)
    rating, safe = draw.integers(0, 5, 64), draw.integers(-1, 2, (64, 2))

    def ours(scores):
        return (ranking_loss(scores, jnp.array(rating), 'large') + 0.7 * safety_loss(scores, jnp.array(safe))).mean()

    loss, gradient = jax.value_and_grad(ours)(jnp.array(scores))
    theirs = torch.tensor(scores, requires_grad=True)
    margin = torch.tensor([0, 0, 1, 2, 3])[torch.tensor(rating)]
    ranking = -torch.nn.functional.logsigmoid(theirs[:, 0] - theirs[:, 1] - margin)
    labels = torch.tensor(safe).float()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(theirs, labels.clamp(0), reduction='none')
    answer = (ranking + 0.7 * (entropy * (labels >= 0)).sum(1) / 2).mean()
    answer.backward()
    assert abs(float(loss) - answer.item()) < 1e-5
    np.testing.assert_allclose(gradient, theirs.grad, rtol=0, atol=1e-6)


def test_far_apart_scores_stay_finite():
    scores, rating, safe = jnp.array([[-1e4, 1e4]]), jnp.array([4]), jnp.array([[1, 0]])
    loss, gradient = jax.value_and_grad(lambda x: (ranking_loss(x, rating, 'large') + safety_loss(x, safe)).sum())(scores)
    assert float(loss) == pytest.approx(20003 + 10000)
    assert np.isfinite(gradient).all()
