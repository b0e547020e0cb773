"""Rewards, advantages and clipped losses: by hand, and against an independent statement in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.ops import returns

RNG = np.random.default_rng(0)


def rows(count=5, length=12):
    """Values, rewards, log-probabilities and masks of answers of all kinds: a single token, up to the very end, none before."""
    mask = np.zeros((count, length), np.float32)
    for row, (start, stop) in enumerate([(3, 4), (2, length), (0, 5), (4, 9), (0, length)]):
        mask[row, start:stop] = 1
    draw = lambda: RNG.normal(size=(count, length)).astype(np.float32)  # noqa: E731
    return mask, *(draw() for _ in range(5))


def test_gate_by_hand():
    """0.15 of the sigmoid is -1.7346 of the linear score; a tag or a lower score takes the safety model's."""
    helpful, safe = jnp.array([5.0, 5.0, 5.0, -5.0]), jnp.array([-1.734, -1.735, 4.0, 60.0])
    score, gated = returns.gate(helpful, safe, jnp.array([False, False, True, False]), 0.15)
    np.testing.assert_array_equal(score, np.float32([5.0, -1.735, 4.0, -5.0]))  # float32, and nothing saturates
    assert gated.tolist() == [False, True, True, False]
    assert score.dtype == jnp.float32


def test_whitening_by_hand():
    np.testing.assert_allclose(returns.whiten(jnp.array([1.0, 2.0, 3.0, 6.0])), np.array([-2, -1, 0, 3]) / 3.5**0.5, rtol=1e-6)
    masked = returns.whiten(jnp.array([[1.0, 100.0], [3.0, -7.0]]), jnp.array([[1.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_allclose(masked, [[-1, 0], [1, 0]], rtol=1e-6)
    assert returns.whiten(jnp.full(3, 7.0)).tolist() == [0, 0, 0]


def test_kl_by_hand():
    log, reference = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.4]))
    np.testing.assert_allclose(returns.k1(log, reference), [np.log(2), -np.log(2)], rtol=1e-6)
    np.testing.assert_allclose(returns.k3(log, reference), [0.5 - 1 + np.log(2), 2 - 1 - np.log(2)], rtol=1e-6)


def test_the_score_is_paid_at_the_last_token_whatever_it_is():
    """Rows that are full, that end early, of one token; tokens are not even looked at."""
    mask = jnp.array([[0.0, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]])
    found = returns.token_rewards(jnp.array([1.0, 2.0, 3.0]), jnp.full((3, 4), 10.0), mask, 0.01)
    np.testing.assert_allclose(found, [[0, -0.1, -0.1, 0.9], [0, -0.1, 1.9, 0], [2.9, 0, 0, 0]], rtol=1e-6)
    assert found.dtype == jnp.float32


def test_advantages_by_hand():
    """γ = 1, λ = 1/2. δ = (1 + 4 - 2, 0 + 8 - 4, 10 - 8) = (3, 4, 2), A = (3 + 5/2, 4 + 2/2, 2)."""
    reward, value = jnp.array([[99.0, 1, 0, 10, 99]]), jnp.array([[7.0, 2, 4, 8, 50]])
    advantage, target = returns.advantages(reward, value, jnp.array([[0.0, 1, 1, 1, 0]]), 1.0, 0.5)
    assert advantage.tolist() == [[0, 5.5, 5, 2, 0]]
    assert target.tolist() == [[0, 7.5, 9, 10, 0]]
    advantage, _ = returns.advantages(jnp.array([[0.0, 0, 8]]), jnp.zeros((1, 3)), jnp.ones((1, 3)), 0.5, 1.0)
    assert advantage.tolist() == [[2, 4, 8]]


def test_group_advantages_by_hand():
    """2, 4 and 9 to one prompt, 1, 1, 1 to another: the means of the other two are 6.5, 5.5, 3; the deviation is sqrt(26/3)."""
    reward = jnp.array([[2.0, 4.0, 9.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(returns.group_advantages(reward, scaled=False), [[-4.5, -1.5, 6], [0, 0, 0]], atol=1e-6)
    scaled = np.array([[-3, -1, 4], [0, 0, 0]]) / (26 / 3) ** 0.5
    np.testing.assert_allclose(returns.group_advantages(reward, scaled=True), scaled, atol=1e-6)


def test_clipped_losses_by_hand():
    ratios, advantage = np.array([1.0, 1.5, 0.5, 1.5, 0.5]), jnp.array([2.0, 2, 2, -2, -2])
    loss, ratio, clipped = returns.policy_loss(jnp.log(jnp.array(ratios)), jnp.zeros(5), advantage, 0.2)
    np.testing.assert_allclose(loss, [-2, -2.4, -1, 3, 1.6], rtol=1e-6)
    np.testing.assert_allclose(ratio, ratios, rtol=1e-6)
    assert clipped.tolist() == [0, 1, 0, 0, 1]
    gradient = jax.grad(lambda log: returns.policy_loss(log, jnp.zeros(5), advantage, 0.2)[0].sum())(jnp.log(jnp.array(ratios)))
    np.testing.assert_allclose(gradient, [-2, 0, -1, 3, 0], rtol=1e-6)
    loss, clipped = returns.value_loss(jnp.array([1.0, 1.5, 0.9]), jnp.ones(3), jnp.array([3.0, 3, 0]), 0.2)
    np.testing.assert_allclose(loss, [2, 0.5 * 1.8**2, 0.5 * 0.81], rtol=1e-6)
    assert clipped.tolist() == [0, 1, 0]


def test_everything_is_what_torch_says():
    torch = pytest.importorskip('torch')
    mask, log, reference, value, old, noise = rows()
    score = RNG.normal(size=len(mask)).astype(np.float32)
    m, lp, ref, v = (torch.tensor(x) for x in (mask, log, reference, value))
    # A loop over tokens and the answers' own lengths, in double precision.
    reward, advantage = torch.zeros(mask.shape).double(), torch.zeros(mask.shape).double()
    for b in range(len(mask)):
        places = torch.nonzero(m[b])[:, 0].tolist()
        ahead, after = 0.0, 0.0
        for t in reversed(places):
            reward[b, t] = -0.05 * (lp[b, t] - ref[b, t]).double() + (score[b] if t == places[-1] else 0)
            ahead = reward[b, t] + 0.99 * after - v[b, t].double() + 0.99 * 0.95 * ahead
            advantage[b, t], after = ahead, v[b, t].double()
    chosen = advantage[m.bool()]
    white = torch.zeros_like(advantage)
    white[m.bool()] = (chosen - chosen.mean()) * torch.rsqrt(chosen.var(unbiased=False) + 1e-8)

    ours = returns.token_rewards(score, returns.k1(log, reference), mask, 0.05)
    np.testing.assert_allclose(ours, reward, atol=1e-5)
    found, target = returns.advantages(ours, value, mask, 0.99, 0.95)
    np.testing.assert_allclose(found, advantage, atol=1e-5)
    np.testing.assert_allclose(target, (advantage + v) * m, atol=1e-5)
    np.testing.assert_allclose(returns.whiten(found, mask), white, atol=1e-5)

    ratio = torch.exp(torch.tensor(log) - torch.tensor(old))
    expected = torch.max(-white * ratio, -white * ratio.clamp(0.8, 1.2))
    loss, _, _ = returns.policy_loss(log, old, white.numpy().astype(np.float32), 0.2)
    np.testing.assert_allclose(loss, expected, atol=1e-5, rtol=1e-5)
    near = torch.tensor(old) + (torch.tensor(value) - torch.tensor(old)).clamp(-0.2, 0.2)
    expected = 0.5 * torch.max((torch.tensor(value) - torch.tensor(noise)) ** 2, (near - torch.tensor(noise)) ** 2)
    np.testing.assert_allclose(returns.value_loss(value, old, noise, 0.2)[0], expected, atol=1e-5, rtol=1e-5)
    kl = torch.distributions.kl_divergence  # k1 and k3 of all tokens, weighted by π, are the divergence
    p, q = torch.softmax(torch.tensor(log), -1), torch.softmax(torch.tensor(reference), -1)
    exact = kl(torch.distributions.Categorical(p), torch.distributions.Categorical(q))
    for estimate in (returns.k1, returns.k3):
        tokens = estimate(jnp.log(p.numpy()), jnp.log(q.numpy()))
        np.testing.assert_allclose((p.numpy() * tokens).sum(-1), exact, atol=1e-5)


def test_padding_changes_nothing():
    mask, log, reference, value, noise, _ = rows()
    wide = [np.pad(x, ((0, 0), (0, 7)), constant_values=np.nan_to_num(5.0)) for x in (log, reference, value, noise)]
    wide_mask = np.pad(mask, ((0, 0), (0, 7)))

    def of(log, reference, value, score, mask):
        reward = returns.token_rewards(score, returns.k1(log, reference), mask, 0.1)
        advantage, target = returns.advantages(reward, value, mask, 1.0, 0.95)
        return returns.whiten(advantage, mask), target

    score = np.arange(5, dtype=np.float32)
    for narrow, padded in zip(of(log, reference, value, score, mask), of(*wide[:3], score, wide_mask), strict=True):
        np.testing.assert_allclose(padded[:, :12], narrow, atol=1e-6)
        assert not np.any(padded[:, 12:])
