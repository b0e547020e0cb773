"""Activations times a parameter: gathered when it is used, its gradient scattered back where it rests."""

import dataclasses
from functools import partial
from types import EllipsisType

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from llama2_jax.mesh import DATA_AXES, GATHERED, PARAMETERS, decoding, gather, reshard, spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix in eight bits, for decoding and beside adapters: values × scales.

    Attributes:
      values: int8 [D, X], X all axes but D: with more of them a TPU would write the matrix out in the compute dtype first.
      scales: float32, one for each output of a product, [D] or [X].
    """

    values: jax.Array
    scales: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={'static': True})  # of the axes that X stands for

    def __getitem__(self, index: EllipsisType) -> 'Int8':  # modules read a parameter as `w[...]`
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A matrix with a product of two thin ones beside it, weight + scale × a·b, which is never made (`model.lora`).

    Attributes:
      weight: as it rests.
      a, b: float32, [axes that are summed over, A] and [A, axes that are made].
    """

    weight: jax.Array
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={'static': True})

    def __getitem__(self, index: EllipsisType) -> 'Adapted':  # as of `Int8`
        return self


def quantize(weight: jax.Array, sums_D: bool) -> Int8:
    """Rounds a matrix [D, …] to eight bits, symmetrically, with one scale for each output.

    `sums_D`: products sum over D, else over the other axes.
    """
    shape = weight.shape[1:]
    weight = weight.reshape(len(weight), -1).astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=0 if sums_D else 1, keepdims=True)
    scales = jnp.where(largest > 0, largest / 127, 1)
    return Int8(jnp.round(weight / scales).astype(jnp.int8), scales.reshape(-1), shape)


def linear(expression: str, x: jax.Array, weight: jax.Array | Int8 | Adapted) -> jax.Array:
    """einsum(expression, x, weight), the letters placing every array (`mesh`).

    Args:
      expression: such as 'BLD,DHK->BLHK'.
      x: activations in the compute dtype.
      weight: a parameter as it rests; it is cast to the compute dtype, then gathered.

    Returns:
      Activations in the compute dtype.
    """
    if isinstance(weight, Adapted):
        before, _, out = _letters(expression)
        thin = linear(f'{before},{before[2:]}A->BLA', x, weight.a)
        return linear(expression, x, weight.weight) + weight.scale * linear(f'BLA,A{out[2:]}->{out}', thin, weight.b)
    return _linear_int8(expression, x, weight) if isinstance(weight, Int8) else _linear(expression, x, weight)


def _linear_int8(expression, x, weight):
    before, letters, out = _letters(expression)
    flat = 'BLD,DX->BLX' if before == 'BLD' else 'BLX,DX->BLD'
    x = x.reshape(*x.shape[:2], -1)
    # A scale belongs to an output, so it can wait for the product, and the weights are read as the bytes they are.
    values = reshard(weight.values, letters[:2]).astype(x.dtype)
    scales = reshard(weight.scales, out[2])
    out_spec = spec(out)
    flat_spec = None if out_spec is None else P(*out_spec[:3])
    y = jnp.einsum(flat, x, values, out_sharding=flat_spec, preferred_element_type=jnp.float32)
    y = (y * scales[None, None]).astype(x.dtype)
    return y if out == 'BLD' else y.reshape((*y.shape[:2], *weight.shape), out_sharding=out_spec)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(expression: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    before, letters, out = _letters(expression)
    weight = gather(weight.astype(x.dtype), letters)
    if before == 'BLHK' and decoding():  # one sum, or CPUs turn the weight around for every token; training on TPUs loses by it
        expression, x, weight = 'BLX,DX->BLD', x.reshape(*x.shape[:2], -1), weight.reshape(len(weight), -1)
    return jnp.einsum(expression, x, weight, out_sharding=spec(out))


def _letters(expression: str) -> tuple[str, str, str]:
    operands, out = expression.split('->')
    before, weight = operands.split(',')
    return before, weight, out


def _forward(expression, x, weight):
    return _linear(expression, x, weight), (x, weight)


def _backward(expression, residuals, dy):
    """Written out because JAX's own transposes the weight's gradient, for which XLA copies activations on CPU: half the speed."""
    x, weight = residuals
    before, letters, out = _letters(expression)
    gathered = gather(weight.astype(x.dtype), letters)
    dx = jnp.einsum(f'{out},{letters}->{before}', dy, gathered, out_sharding=spec(before))
    weight_spec = spec(letters, GATHERED)
    if weight_spec is None:
        return dx, jnp.einsum(f'{before},{out}->{letters}', x, dy).astype(weight.dtype)
    # One partial sum a device, added up and scattered in one reduction.
    partial_sums = P(*weight_spec, unreduced=set(DATA_AXES))
    dweight = jnp.einsum(f'{before},{out}->{letters}', x, dy, out_sharding=partial_sums)
    return dx, jax.sharding.reshard(dweight, spec(letters, PARAMETERS)).astype(weight.dtype)


_linear.defvjp(_forward, _backward)
