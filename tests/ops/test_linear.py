import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama2_jax.config import ModelConfig
from llama2_jax.mesh import decoding_mesh
from llama2_jax.ops.linear import linear, quantize

SIZES = {'B': 2, 'L': 1, 'D': 6, 'H': 2, 'K': 4, 'F': 10}


def array(letters, seed):
    return jax.random.normal(jax.random.key(seed), [SIZES[letter] for letter in letters])


@pytest.mark.parametrize('expression', ['BLD,DHK->BLHK', 'BLHK,DHK->BLD', 'BLD,DF->BLF', 'BLF,DF->BLD'])
def test_eight_bits_are_the_rounded_matrix(expression):
    """The product is that with the matrix which values and scales stand for, and that one is half a step away at most."""
    before, letters = expression.split('->')[0].split(',')
    x, weight, sums_D = array(before, 0), array(letters, 1), before == 'BLD'
    eight = quantize(weight, sums_D)
    matrix = np.asarray(eight.values, np.float64) * (eight.scales[None] if sums_D else eight.scales[:, None])
    step = np.broadcast_to(eight.scales[None] if sums_D else eight.scales[:, None], matrix.shape)
    assert eight.values.dtype == 'int8' and np.abs(np.asarray(eight.values)).max(axis=0 if sums_D else 1).min() == 127
    assert np.all(np.abs(matrix - np.asarray(weight).reshape(matrix.shape)) <= step / 2 + 1e-7)
    expected = np.einsum(expression, x, matrix.reshape(weight.shape))
    with jax.set_mesh(decoding_mesh(ModelConfig(), jax.devices()[:1])):
        found = jax.jit(lambda x, eight: linear(expression, x, eight))(x, eight)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_column_of_zeros_stays_zero():
    eight = quantize(jnp.zeros((3, 2)), sums_D=True)
    assert not np.asarray(eight.values).any() and np.isfinite(eight.scales).all()
