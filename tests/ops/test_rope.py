import jax
import jax.numpy as jnp
import numpy as np

from llama2_jax.ops.rope import rope_table, rotate


def test_table_by_hand():
    """Head size 4, theta 100: frequencies 1 and 1/10."""
    cos, sin = rope_table(jnp.arange(3), 4, theta=100.0)
    angles = np.array([[0, 0], [1, 0.1], [2, 0.2]])
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)
    assert rope_table(jnp.zeros((5, 7), int), 8)[0].shape == (5, 7, 4)


def test_rotation_by_hand():
    """Component 0 pairs with 2 and 1 with 3: a quarter turn of the first pair, none of the second."""
    x_BLHK = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    cos, sin = jnp.array([[0.0, 1.0]]), jnp.array([[1.0, 0.0]])
    assert rotate(x_BLHK, cos, sin).ravel().tolist() == [-3.0, 2.0, 1.0, 4.0]
    assert rotate(x_BLHK.astype(jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


def test_positions_may_differ_by_row():
    x_BLHK = jax.random.normal(jax.random.key(0), (2, 3, 2, 8))
    positions_BL = jnp.array([[0, 1, 2], [7, 0, 1]])
    both = rotate(x_BLHK, *rope_table(positions_BL, 8))
    for row in (0, 1):
        np.testing.assert_allclose(both[row], rotate(x_BLHK[row][None], *rope_table(positions_BL[row], 8))[0], atol=1e-6)


def test_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))

    def score(m, n):
        return float(jnp.sum(rotate(q, *rope_table(jnp.array([m]), 16)) * rotate(k, *rope_table(jnp.array([n]), 16))))

    assert abs(score(5, 2) - score(1005, 1002)) < 1e-3
    assert abs(score(5, 2) - score(3, 0)) < 1e-5
    assert abs(score(5, 2) - score(2, 5)) > 1e-2
