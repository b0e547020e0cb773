"""Meshes, and the tables that say where an array with a letter suffix lives on them.

Axes of the mesh for training, slowest network first:
  replica   copies of the whole model, across slices; only gradients travel
  fsdp      the batch, and every parameter and its optimizer state (gathered layer by layer)
  sequence  the length, for long context
  tensor    heads, feed-forward and vocabulary

Axes of the mesh for decoding, where weights stay and activations travel:
  replica   copies of the model, each with sequences of its own
  rows      weights are cut over it; the cache by its rows
  tensor    weights and cache are cut over it, by heads
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import Config, ModelConfig, UserError, between

AXES = ('replica', 'fsdp', 'sequence', 'tensor')
BATCH_AXES = ('replica', 'fsdp')
DATA_AXES = ('replica', 'fsdp', 'sequence')  # the axes over which tokens differ, so gradients are summed
DECODING_AXES = ('replica', 'rows', 'tensor')

# Letter -> mesh axes; the letters are explained in model/llama.py. What is missing raises.
Table = Mapping[str, tuple[str, ...]]
ACTIVATIONS: Table = {
    'N': (), 'B': BATCH_AXES, 'L': ('sequence',), 'M': (), 'D': (),
    'H': ('tensor',), 'G': ('tensor',), 'K': (), 'F': ('tensor',), 'V': ('tensor',), 'A': (),
}  # fmt: skip
# Parameters at rest: the model dimension is cut over everything that does not cut another letter.
PARAMETERS: Table = {
    'N': (), 'D': ('fsdp', 'sequence'), 'H': ('tensor',), 'G': ('tensor',), 'K': (), 'F': ('tensor',), 'V': ('tensor',), 'A': (),
}  # fmt: skip
# Parameters in use: gathered over fsdp and sequence.
GATHERED: Table = {**PARAMETERS, 'D': ()}

# For decoding. R is the batch where its rows are cut further, which they are in the cache.
DECODING_ACTIVATIONS: Table = {
    'B': ('replica',), 'R': ('replica', 'rows'), 'L': (), 'M': (), 'D': (),
    'H': ('tensor', 'rows'), 'G': ('tensor',), 'K': (), 'F': ('tensor', 'rows'), 'V': ('tensor', 'rows'),
}  # fmt: skip
DECODING_PARAMETERS: Table = {
    'N': (), 'D': (), 'H': ('tensor', 'rows'), 'G': ('tensor',), 'K': (), 'F': ('tensor', 'rows'), 'V': ('tensor', 'rows'),
}  # fmt: skip

LAYOUTS = {AXES: (ACTIVATIONS, PARAMETERS), DECODING_AXES: (DECODING_ACTIVATIONS, DECODING_PARAMETERS)}


def tables() -> tuple[Table, Table]:
    """The tables of the mesh that is set: for activations, and for parameters at rest."""
    return LAYOUTS[jax.sharding.get_abstract_mesh().axis_names]


@dataclasses.dataclass(frozen=True)
class MeshConfig(Config):
    """Sizes of the mesh axes; one may be -1: whatever the devices leave."""

    replica: int = between(1, -1, 2**20)
    fsdp: int = between(-1, -1, 2**20)
    sequence: int = between(1, -1, 2**20)
    tensor: int = between(1, -1, 2**20)

    def sizes(self, devices: int) -> tuple[int, ...]:
        """The four sizes for this many devices.

        Raises:
          UserError: if they do not multiply to the number of devices.
        """
        sizes = [getattr(self, axis) for axis in AXES]
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise UserError(f'mesh {self.text(sizes)}: sizes are positive, and at most one is -1.')
        known = int(np.prod([size for size in sizes if size != -1]))
        if -1 in sizes and devices % known == 0:
            sizes[sizes.index(-1)] = devices // known
        if int(np.prod(sizes)) != devices:
            raise UserError(f'mesh {self.text(sizes)} does not fit {devices} devices.')
        return tuple(sizes)

    @staticmethod
    def text(sizes: Sequence[int]) -> str:
        """For people: `replica=1 × fsdp=8 × …`."""
        return ' × '.join(f'{axis}={size}' for axis, size in zip(AXES, sizes, strict=True))


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with explicit axes over the given devices (default: all there are), laid out for their network."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(config.sizes(len(devices)), AXES, axis_types=(AxisType.Explicit,) * len(AXES), devices=devices)


def set_mesh(config: MeshConfig) -> Mesh:
    """Makes the mesh of all devices and sets it for the rest of the process."""
    mesh = make_mesh(config)
    jax.set_mesh(mesh)
    return mesh


def decoding_mesh(config: ModelConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh on which these devices decode: weights are cut as far as they divide, what devices are left hold copies."""
    devices = list(jax.devices() if devices is None else devices)

    def largest(limit: int, sizes: Sequence[int]) -> int:
        return max(n for n in range(1, limit + 1) if limit % n == 0 and not any(size % n for size in sizes))

    tensor = largest(len(devices), (config.kv_heads, config.hidden, config.vocab_size))
    cut = [size // tensor for size in (config.heads, config.hidden, config.vocab_size)]
    rows = largest(len(devices) // tensor, cut)
    sizes = (len(devices) // tensor // rows, rows, tensor)
    return jax.make_mesh(sizes, DECODING_AXES, axis_types=(AxisType.Explicit,) * len(sizes), devices=devices)


def spec(letters: str, table: Table | None = None) -> P | None:
    """The partition of an array with these axes; None where no mesh is set, so that the model also runs without one.

    `table`: by default that of activations.

    >>> spec('BLD')  # doctest: +SKIP
    PartitionSpec(('replica', 'fsdp'), 'sequence', None)
    """
    if jax.sharding.get_abstract_mesh().empty:
        return None
    table = table or tables()[0]
    axes = [table[letter] for letter in letters]
    used = [axis for entry in axes for axis in entry]
    if len(set(used)) != len(used):
        raise ValueError(f'{letters}: two letters land on one mesh axis ({used}).')
    return P(*(entry[0] if len(entry) == 1 else entry or None for entry in axes))


def parameter_name(path: tuple[Any, ...]) -> str:
    """The attribute that holds a parameter, from its path in a tree: 'w_q_DHK'."""
    return next(key.name for key in reversed(path) if getattr(key, 'name', 'value') != 'value')


def parameter_letters(name: str) -> str:
    """The axes of a parameter, from its name: 'w_q_DHK' -> 'DHK'."""
    return name.rpartition('_')[2]


def parameter_spec(name: str) -> P | None:
    """Where a parameter rests. Vectors are replicated: a gather of one would cost more than it saves."""
    letters = parameter_letters(name)
    if jax.sharding.get_abstract_mesh().empty:
        return None
    return spec(letters, tables()[1]) if len(letters) > 1 else P(None)


def shard_batch(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """This process's rows of a batch [b, L] as a global array [B, L], rows over replica and fsdp.

    The length is cut by the step, after it has split inputs from targets.
    """
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P(BATCH_AXES)), array)


def decoding() -> bool:
    """Whether the mesh that is set is one for decoding."""
    return jax.sharding.get_abstract_mesh().axis_names == DECODING_AXES


def reshard(array: jax.Array, letters: str) -> jax.Array:
    """An activation moved to where its letters say."""
    return array if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(array, spec(letters))


def replicate(array: jax.Array) -> jax.Array:
    """The whole array on every device."""
    return array if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(array, P())


def gather(weight: jax.Array, letters: str) -> jax.Array:
    """A parameter made ready for use: gathered over the axes that cut D in training; for decoding it lies where it is used.

    `reduced` says that its gradient arrives as one partial sum a device, so that it is scattered back in one reduction.
    """
    if jax.sharding.get_abstract_mesh().axis_names != AXES:
        return weight
    return jax.sharding.reshard(weight, P(*spec(letters, GATHERED), reduced=set(DATA_AXES)))
