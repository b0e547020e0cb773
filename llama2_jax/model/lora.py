"""LoRA (Hu et al., 2021, arXiv 2106.09685): a frozen model learns by adding products of two thin matrices to some of its own.

Beside the letters of `model/llama.py`: A adapter rank. `w_q_DHK` becomes w_q_DHK + alpha / rank × a_q_DA · b_q_AHK.
"""

import dataclasses
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from llama2_jax.config import Config, ModelConfig, UserError, nearest
from llama2_jax.mesh import parameter_name, parameter_spec
from llama2_jax.model.llama import Llama, normal
from llama2_jax.ops.linear import Adapted, Int8, quantize

# Matrix of a layer -> the axes that its product sums over, and those that it makes.
MATRICES = {
    'q': ('D', 'HK'), 'k': ('D', 'GK'), 'v': ('D', 'GK'), 'o': ('HK', 'D'),
    'gate': ('D', 'F'), 'up': ('D', 'F'), 'down': ('F', 'D'),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoraConfig(Config):
    """Adapters of every layer.

    Attributes:
      rank: Rank of the adapters; 0: none, the model itself is trained.
      alpha: Numerator of the scale alpha / rank of the adapters' product.
      matrices: Names of MATRICES; in --set separated by commas.
      int8: Keeps the frozen matrices of the layers in eight bits, for a chip without room for sixteen.
    """

    rank: int = 0
    alpha: float = 32.0
    matrices: tuple[str, ...] = tuple(MATRICES)
    int8: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.matrices:
            if name not in MATRICES:
                raise UserError(f'lora.matrices: there is no {name!r}; {nearest(name, MATRICES)}')
        if not self.matrices or len(set(self.matrices)) < len(self.matrices):
            raise UserError('lora.matrices names at least one matrix, and each once.')
        if self.int8 and not self.rank:
            raise UserError('lora.int8=true needs adapters: set lora.rank.')

    @property
    def scale(self) -> float:
        """The factor of what is added."""
        return self.alpha / self.rank


def names(matrix: str) -> tuple[str, str, str]:
    """A matrix and its two factors.

    >>> names('o')
    ('w_o_DHK', 'a_o_HKA', 'b_o_AD')
    """
    before, after = MATRICES[matrix]
    return f'w_{matrix}_D{(before + after).replace("D", "")}', f'a_{matrix}_{before}A', f'b_{matrix}_A{after}'


class Adapters(nnx.Module):
    """The factors of all layers, stacked; `b` begins as zeros, so that the model begins unchanged."""

    def __init__(self, model: ModelConfig, lora: LoraConfig, key: jax.Array):
        sizes = {'D': model.dim, 'H': model.heads, 'G': model.kv_heads, 'K': model.head_dim, 'F': model.hidden, 'A': lora.rank}
        for matrix, own in zip(lora.matrices, jax.random.split(key, len(lora.matrices)), strict=True):
            before, after = MATRICES[matrix]
            _, a, b = names(matrix)
            into, out = ([sizes[letter] for letter in letters] for letters in (before, after))
            fan_in = sizes['D'] if before == 'D' else sizes['F'] if before == 'F' else sizes['H'] * sizes['K']
            setattr(self, a, normal(own, a, (*into, lora.rank), fan_in))
            setattr(self, b, nnx.Param(jnp.zeros((lora.rank, *out), jnp.float32, out_sharding=parameter_spec(b))))


def make_adapters(model: ModelConfig, lora: LoraConfig, key: jax.Array) -> Adapters:
    """Adapters for all layers of a model of this shape."""
    return jax.vmap(partial(Adapters, model, lora))(jax.random.split(key, model.layers))


def adapt(model: Llama, adapters: Adapters, lora: LoraConfig) -> Llama:
    """The model with the adapters beside its matrices: for training, where neither sum nor gradient of a matrix is wanted."""
    return _replace(model, adapters, lora, lambda name, weight, a, b: Adapted(weight, a, b, lora.scale))


def with_adapters(base_model: Llama | None, params: Llama | Adapters, lora: LoraConfig) -> Llama:
    """The model that is trained: the parameters themselves, or the base model with them as its adapters."""
    if base_model is None or isinstance(params, Llama):
        return cast(Llama, params)
    return adapt(base_model, params, lora)


@jax.jit
def to_int8(model: Llama) -> Llama:
    """The model with the matrices of its layers rounded, one layer after the other, as there is no room for all in float32."""

    def of(path, stack):
        sums_D = {names(matrix)[0]: before == 'D' for matrix, (before, _) in MATRICES.items()}.get(parameter_name(path))
        return stack if sums_D is None else jax.lax.map(partial(quantize, sums_D=sums_D), stack)

    return jax.tree_util.tree_map_with_path(of, model)


@partial(jax.jit, static_argnames='lora')
def merge(model: Llama, adapters: Adapters, lora: LoraConfig) -> Llama:
    """The model with the adapters added to its matrices, in float32, rounded once to the dtype of the matrix."""

    def add(name, weight, a, b):
        before, after = MATRICES[name.split('_')[1]]
        letters, spec = name.rpartition('_')[2], parameter_spec(name)
        placed = None if spec is None else jax.sharding.PartitionSpec(None, *spec)
        product = jnp.einsum(f'N{before}A,NA{after}->N{letters}', a, b, out_sharding=placed, precision='highest')
        return (weight.astype(jnp.float32) + lora.scale * product).astype(weight.dtype)

    return _replace(model, adapters, lora, add)


def _replace(model, adapters, lora, combine):
    """The model with `combine` (name, weight, a, b) in place of each matrix that has an adapter."""
    factors = {w: (getattr(adapters, a)[...], getattr(adapters, b)[...]) for w, a, b in map(names, lora.matrices)}

    def of(path, weight):
        name = parameter_name(path)
        return combine(name, weight, *factors[name]) if name in factors else weight

    return jax.tree_util.tree_map_with_path(of, model, is_leaf=lambda leaf: isinstance(leaf, Int8))
