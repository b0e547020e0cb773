import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.mesh import MeshConfig, make_mesh, parameter_spec, reshard
from llama2_jax.ops.embedding import embed

TOKENS = np.array([[1, 5, 1, 0], [7, 7, 7, 2], [3, 0, 6, 1], [0, 4, 2, 5]], np.int32)


def gradient(table_VD, tokens_BL, weights_BLD, dtype='float32'):
    def loss(table_VD):
        return jnp.sum(embed(table_VD, reshard(tokens_BL, 'BL'), dtype).astype(jnp.float32) * reshard(weights_BLD, 'BLD'))

    return jax.jit(jax.value_and_grad(loss))(table_VD)


@pytest.mark.parametrize(
    'mesh',
    [None, MeshConfig(fsdp=4, tensor=2), MeshConfig(replica=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, sequence=2, tensor=2)],
)
def test_rows_and_their_gradients(mesh):
    rng = np.random.default_rng(0)
    table, weights = rng.normal(size=(8, 16)).astype(np.float32), rng.normal(size=(4, 4, 16)).astype(np.float32)
    expected = np.zeros((8, 16))
    np.add.at(expected, TOKENS, weights)
    if mesh:
        with jax.set_mesh(make_mesh(mesh)):
            placed = jax.sharding.reshard(jnp.asarray(table), parameter_spec('table_VD'))
            rows = embed(placed, reshard(jnp.asarray(TOKENS), 'BL'), 'float32')
            value, found = gradient(placed, jnp.asarray(TOKENS), jnp.asarray(weights))
            assert found.sharding == placed.sharding
    else:
        rows, (value, found) = embed(jnp.asarray(table), jnp.asarray(TOKENS), 'float32'), gradient(table, TOKENS, weights)
    assert np.array_equal(rows, table[TOKENS])
    assert abs(float(value) - np.sum(table[TOKENS] * weights)) < 1e-4
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_gradients_are_summed_in_float32():
    """A thousand times 1/256 is lost beyond 1 in bfloat16, where 1 + 1/256 is 1."""
    tokens, weights = np.zeros((1, 1024), np.int32), np.full((1, 1024, 2), 1 / 256, np.float32)
    _, found = gradient(jnp.ones((3, 2)), tokens, weights, 'bfloat16')
    assert embed(jnp.ones((3, 2)), tokens, 'bfloat16').dtype == jnp.bfloat16
    assert found.dtype == jnp.float32 and found.tolist() == [[4, 4], [0, 0], [0, 0]]
