import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.ops.sampling import nucleus, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])  # sorted: 1, 3, 4, 0, 2; cumulated: 0.4, 0.7, 0.85, 0.95, 1


@pytest.mark.parametrize(
    ('top_p', 'kept'),
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
def test_nucleus_by_hand(top_p, kept):
    """A token stays where those before it have at most `top_p`, so the one that crosses is in."""
    logits = jnp.log(jnp.array(PROBABILITIES, jnp.float32))[None]
    found = np.asarray(nucleus(logits, top_p))[0]
    assert set(np.flatnonzero(np.isfinite(found))) == kept
    assert np.array_equal(found[sorted(kept)], logits[0][jnp.array(sorted(kept))])


def draw(count, temperature, top_p):
    logits = jnp.log(jnp.array(PROBABILITIES, jnp.float32))[None].repeat(count, axis=0) + 7
    tokens = sample(logits, jax.random.key(0), jnp.float32(temperature), jnp.float32(top_p))
    assert tokens.dtype == jnp.int32 and tokens.shape == (count,)
    return np.bincount(tokens, minlength=5)


@pytest.mark.parametrize(
    ('temperature', 'top_p', 'expected'),
    [
        (1.0, 1.0, PROBABILITIES),
        (0.5, 1.0, PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        (1.0, 0.6, np.array([0, 4, 0, 3, 0]) / 7),
        # Temperature comes first: squared, 1 and 3 have 0.903 of the probability.
        (0.5, 0.8, np.array([0, 16, 0, 9, 0]) / 25),
    ],
)
def test_frequencies(temperature, top_p, expected):
    """Chi-square of 20,000 draws; 23.5 is its 99.99th percentile with 4 degrees of freedom."""
    counts = draw(20_000, temperature, top_p)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    assert np.sum((counts - 20_000 * expected)[possible] ** 2 / (20_000 * expected)[possible]) < 23.5


def test_temperature_zero_takes_the_best():
    assert draw(50, 0.0, 1.0).tolist() == [0, 50, 0, 0, 0]
