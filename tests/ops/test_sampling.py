import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.ops.sampling import best, inverse_cdf, nucleus, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])  # sorted: 1, 3, 4, 0, 2; cumulated: 0.4, 0.7, 0.85, 0.95, 1
LOGITS = jnp.log(jnp.array(PROBABILITIES, jnp.float32))[None]


def kept(logits):
    return set(np.flatnonzero(np.isfinite(np.asarray(logits)[0])))


@pytest.mark.parametrize(
    ('top_p', 'expected'),
    [
        (0.0, {1}),
        (0.39, {1}),
        (0.41, {1, 3}),
        (0.69, {1, 3}),
        (0.71, {1, 3, 4}),
        (0.86, {0, 1, 3, 4}),
        (0.96, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_nucleus_by_hand(top_p, expected):
    """A token stays where those before it have at most `top_p`, so the one that crosses is in."""
    found = nucleus(LOGITS, jnp.array([top_p]))
    assert kept(found) == expected
    assert np.array_equal(found[0][jnp.array(sorted(expected))], LOGITS[0][jnp.array(sorted(expected))])


def test_nucleus_is_that_of_a_sort():
    """Meta's rule spelt out on 300 rows of 1,000 logits of both signs."""
    rng = np.random.default_rng(0)
    logits, top_p = rng.normal(size=(300, 1000)).astype(np.float32) * 3, rng.uniform(0, 1, 300).astype(np.float32)
    found = np.isfinite(np.asarray(nucleus(jnp.asarray(logits), jnp.asarray(top_p))))
    for row, limit, ours in zip(logits.astype(np.float64), top_p, found, strict=True):
        order = np.argsort(-row)
        probabilities = np.exp(row[order] - row.max()) / np.exp(row - row.max()).sum()
        before = np.cumsum(probabilities) - probabilities
        expected = np.zeros(1000, bool)
        expected[order[before <= limit]] = True
        doubtful = np.abs(before - limit) < 1e-5  # float32 may see these either way
        assert np.array_equal(ours[order][~doubtful], expected[order][~doubtful])


@pytest.mark.parametrize(('k', 'expected'), [(0, {0, 1, 2, 3, 4}), (1, {1}), (3, {1, 3, 4}), (9, {0, 1, 2, 3, 4})])
def test_the_best_k(k, expected):
    assert kept(best(LOGITS, jnp.array([k]))) == expected


def test_inverse_cdf_by_hand():
    """Tokens take up their probabilities in order; what has none is never taken, whatever the number."""
    logits = jnp.log(jnp.array([[0.0, 0.25, 0.0, 0.75, 0.0]])).repeat(6, axis=0)
    uniform = jnp.array([0.0, 0.2499, 0.2501, 0.5, 0.999, 1 - 2**-23])
    assert inverse_cdf(logits, uniform).tolist() == [1, 1, 3, 3, 3, 3]
    wide = jnp.full((3, 1000), -jnp.inf).at[:, jnp.array([127, 128, 999])].set(0.0)
    assert inverse_cdf(wide, jnp.array([0.33, 0.34, 0.99])).tolist() == [127, 128, 999]


def draw(count, temperature, top_p, top_k=0):
    def rows(value, dtype):
        return jnp.full(count, value, dtype)

    uniform = jax.random.uniform(jax.random.key(0), count)
    settings = (rows(temperature, jnp.float32), rows(top_p, jnp.float32), rows(top_k, jnp.int32))
    tokens, logprobs = sample(LOGITS.repeat(count, axis=0) + 7, uniform, *settings)
    assert tokens.dtype == jnp.int32 and tokens.shape == (count,)
    return np.bincount(tokens, minlength=5), np.asarray(tokens), np.asarray(logprobs)


@pytest.mark.parametrize(
    ('temperature', 'top_p', 'top_k', 'expected'),
    [
        (1.0, 1.0, 0, PROBABILITIES),
        (0.5, 1.0, 0, PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        (1.0, 0.6, 0, np.array([0, 4, 0, 3, 0]) / 7),
        # Temperature comes first: squared, 1 and 3 have 0.903 of the probability.
        (0.5, 0.8, 0, np.array([0, 16, 0, 9, 0]) / 25),
        (1.0, 1.0, 3, np.array([0, 0.4, 0, 0.3, 0.15]) / 0.85),
        # Of what the best three leave, 1 and 3 have 0.82 of the probability.
        (1.0, 0.8, 3, np.array([0, 4, 0, 3, 0]) / 7),
    ],
)
def test_frequencies(temperature, top_p, top_k, expected):
    """Chi-square of 20,000 draws; 23.5 is its 99.99th percentile with 4 degrees of freedom."""
    counts, tokens, logprobs = draw(20_000, temperature, top_p, top_k)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert np.sum((counts - 20_000 * expected)[possible] ** 2 / (20_000 * expected)[possible]) < 23.5
    whole = PROBABILITIES ** (1 / temperature)  # the log-probabilities know nothing of top-p and top-k
    np.testing.assert_allclose(logprobs, np.log(whole / whole.sum())[tokens], rtol=0, atol=1e-6)


def test_temperature_zero_takes_the_best():
    counts, _, logprobs = draw(50, 0.0, 1.0)
    assert counts.tolist() == [0, 50, 0, 0, 0]
    np.testing.assert_allclose(logprobs, np.log(0.4), rtol=0, atol=1e-6)


@pytest.mark.parametrize('best', [0, 127, 128, 299])
def test_the_first_of_the_best_in_a_vocabulary_of_blocks(best):
    """300 tokens are three blocks, the last of them not full; what comes after the first of equals does not matter."""
    logits = np.random.default_rng(0).normal(size=(1, 300)).astype(np.float32)
    logits[0, [best, *range(best + 1, 300, 7)]] = 9
    tokens, logprobs = sample(jnp.array(logits), jnp.zeros(1), jnp.zeros(1), jnp.ones(1), jnp.zeros(1, jnp.int32))
    assert tokens.tolist() == [best]
    wide = logits[0].astype(np.float64)
    np.testing.assert_allclose(logprobs, 9 - np.log(np.exp(wide).sum()), rtol=0, atol=1e-6)


def test_rows_have_settings_of_their_own():
    uniform = jnp.array([0.9, 0.9, 0.9, 0.9])
    tokens, _ = sample(
        LOGITS.repeat(4, axis=0), uniform, jnp.array([1.0, 0, 1, 1]), jnp.array([1.0, 1, 0.5, 1]), jnp.array([0, 0, 0, 1])
    )
    assert tokens.tolist() == [4, 1, 3, 1]
