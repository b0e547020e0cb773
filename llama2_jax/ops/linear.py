"""Activations times a parameter: gathered when it is used, its gradient scattered back where it rests."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama2_jax.mesh import DATA_AXES, GATHERED, PARAMETERS, gather, spec


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear(expression: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """einsum(expression, x, weight), the letters placing every array (`mesh`).

    Args:
      expression: such as 'BLD,DHK->BLHK'.
      x: activations in the compute dtype.
      weight: a parameter as it rests; it is cast to the compute dtype, then gathered.

    Returns:
      Activations in the compute dtype.
    """
    _, letters, out = _letters(expression)
    return jnp.einsum(expression, x, gather(weight.astype(x.dtype), letters), out_sharding=spec(out))


def _letters(expression: str) -> tuple[str, str, str]:
    operands, out = expression.split('->')
    return *operands.split(','), out


def _forward(expression, x, weight):
    return linear(expression, x, weight), (x, weight)


def _backward(expression, residuals, dy):
    """Written out because JAX's own transposes the weight's gradient, for which XLA copies activations on CPU: half the speed."""
    x, weight = residuals
    before, letters, out = _letters(expression)
    gathered = gather(weight.astype(x.dtype), letters)
    dx = jnp.einsum(f'{out},{letters}->{before}', dy, gathered, out_sharding=spec(before))
    if spec(out) is None:
        return dx, jnp.einsum(f'{before},{out}->{letters}', x, dy).astype(weight.dtype)
    # One partial sum a device, added up and scattered in one reduction.
    partial_sums = P(*spec(letters, GATHERED), unreduced=set(DATA_AXES))
    dweight = jnp.einsum(f'{before},{out}->{letters}', x, dy, out_sharding=partial_sums)
    return dx, jax.sharding.reshard(dweight, spec(letters, PARAMETERS)).astype(weight.dtype)


linear.defvjp(_forward, _backward)
