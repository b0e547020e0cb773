"""Batches on the mesh, and what a mesh must divide."""

from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llama2_jax.config import ModelConfig, UserError
from llama2_jax.mesh import BATCH_AXES, MeshConfig, shard_batch
from llama2_jax.train.step import Batch


class Data(Protocol):
    """`PretrainData` or `DialogData`."""

    def train(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches from a step on."""


def device_batches(data: Data, mesh: Mesh, start: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Batches on the mesh, with their record ids on the host."""
    for batch in data.train(start):
        yield to_mesh(batch, mesh), batch['record_ids']


def to_mesh(batch: Mapping[str, np.ndarray], mesh: Mesh) -> Batch:
    """The arrays [B, L+1] that the step reads, cut over the mesh."""
    return {name: shard_batch(array, mesh) for name, array in batch.items() if name != 'record_ids'}


def abstract_batch(mesh: Mesh, batch_size: int, length: int, **dtypes: jnp.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return {name: jax.ShapeDtypeStruct((batch_size, length + 1), dtype, sharding=sharding) for name, dtype in dtypes.items()}


def check_mesh(mesh: Mesh, model: ModelConfig, batch_size: int, accumulation: int, length: int) -> None:
    """Raises a UserError naming what the mesh does not divide."""
    rows = int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    if batch_size % (rows * accumulation):
        raise UserError(
            f'batch_size={batch_size} in accumulation={accumulation} parts cannot be divided '
            f'over replica × fsdp = {rows} devices.'
        )
    tensor, cuts = mesh.shape['tensor'], mesh.shape['fsdp'] * mesh.shape['sequence']
    divided = {'length': (length, mesh.shape['sequence'])} | {
        f'model.{name}': (getattr(model, name), tensor) for name in ('heads', 'kv_heads', 'hidden', 'vocab_size')
    }
    for name, (size, parts) in (divided | {'model.dim': (model.dim, cuts)}).items():
        if size % parts:
            raise UserError(f'{name}={size} cannot be divided over the {parts} devices of {describe_mesh(mesh)}.')


def describe_mesh(mesh: Mesh) -> str:
    """For people: the mesh and its devices."""
    return f'mesh {MeshConfig.text(tuple(mesh.shape.values()))} of {mesh.devices.flat[0].device_kind}'
