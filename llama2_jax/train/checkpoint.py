"""Checkpoints on Orbax: plain names on disk, any mesh on the way back, damage found before it is used."""

import collections
import contextlib
import dataclasses
import gc
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils.epath import Path
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from llama2_jax.config import UserError, nearest
from llama2_jax.files import check_name, is_remote, locate
from llama2_jax.runtime import barrier, is_main_process
from llama2_jax.runtime.workdir import check_inputs, read_inputs, report_disk_full
from llama2_jax.text.printable import printable

# An array lies on disk in pieces of at most so many bytes, layers or parts of one: it is read layer by layer, and by many hosts,
# without reading the rest.
CHUNK_BYTES = 32 * 2**20
Tree = Any  # a pytree of arrays; an nnx.Module is one


def names(tree: Tree) -> list[str]:
    """The leaves' names in order, such as 'params/blocks/w_q_DHK': a variable of Flax counts as its array."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in paths]


def to_dict(tree: Tree) -> dict[str, Any]:
    """The tree as nested dicts of its arrays, which is what lies on disk: independent of the classes of Flax and Optax."""
    nested = {}
    for name, leaf in zip(names(tree), jax.tree.leaves(tree), strict=True):
        *path, last = name.split('/')
        node = nested
        for part in path:
            node = node.setdefault(part, {})
        node[last] = leaf
    return nested


def on_mesh(abstract: Tree) -> Tree:
    """Shapes, dtypes and shardings to restore onto: the abstract mesh of `jax.eval_shape` becomes the one that is set."""
    mesh = jax.sharding.get_mesh()

    def rebind(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, 'sharding', None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
            sharding = NamedSharding(mesh, sharding.spec, memory_kind=sharding.memory_kind)
        elif sharding is None:
            sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh.empty else NamedSharding(mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(rebind, abstract)


def save_params(directory: str | os.PathLike, params: Tree) -> None:
    """Writes `params` to `directory` in place of what is there. Every process calls it; it returns when all is written.

    Raises:
      UserError: no space is left, or what was written is not complete.
    """
    directory = locate(directory)
    check_name(directory)
    tree = to_dict(params)
    pieces = jax.tree.map(lambda leaf: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if leaf.ndim else ()), tree)
    with report_disk_full(directory), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, tree, save_args=pieces, force=True)
    _check_complete(directory, _shapes(params))


def load_params(directory: str | os.PathLike, abstract: Tree, cast: bool = False) -> Tree:
    """Reads what `save_params` wrote, as the tree and onto the shardings of `abstract` (of `jax.eval_shape`, say).

    Raises:
      UserError: nothing is there, it is damaged, or a name, shape or (unless `cast`) dtype differs (the first one is named).
    """
    directory = locate(directory)
    if not directory.is_dir():
        raise UserError(f'There are no parameters to read: {directory} does not exist.')
    with _report_corruption(f'The parameters in {directory} are damaged or incomplete'):
        return _read(directory, on_mesh(abstract), cast)


class Checkpoints:
    """The checkpoints of one run in one directory; saved in the background, by all processes together.

    Kept are the last `keep_last`, the one of the lowest held-out loss (`keep_best`), and every `keep_every`-th step.
    A context manager: leaving waits for the save under way and raises if it failed.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_last: int = 3, keep_best: bool = True, keep_every: int = 0):
        self.directory = locate(directory)
        check_name(self.directory)
        self._unchecked: tuple[int, dict[str, tuple[int, ...]]] | None = None  # the save under way, and its shapes
        self._inputs = read_inputs(self.directory.parent)  # every checkpoint holds what it was made from
        self._retention = _Retention(keep_last, keep_best, keep_every)
        # Cleaning up removes what a killed save has left: a checkpoint gets its name only once it is whole.
        options = ocp.CheckpointManagerOptions(preservation_policy=self._retention, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        for step in self.steps:
            with contextlib.suppress(Exception):  # a damaged checkpoint is no candidate for the best
                self._retention.losses[step] = self._read_progress(step)['heldout_loss']

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, rising."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Tree, progress: Mapping[str, Any], heldout_loss: float | None = None) -> None:
        """Copies the state to the host and returns; a failure to write it is raised by the next call or on leaving.

        Args:
          step: the number of steps done.
          state: may be donated to the next step right away.
          progress: whatever else is needed to continue, as JSON values.
          heldout_loss: of this very state, if known.
        """
        extras = {'heldout_loss': heldout_loss, 'checksums': checksums(state), 'progress': dict(progress), 'inputs': self._inputs}
        self.wait()
        self._retention.losses[step] = heldout_loss
        items = ocp.args.Composite(state=ocp.args.StandardSave(to_dict(state)), extras=ocp.args.JsonSave(extras))
        self._manager.save(step, args=items, force=True)
        self._unchecked = step, _shapes(state)

    def restore(self, abstract: Tree) -> tuple[Tree, dict[str, Any]] | None:
        """The newest sound checkpoint as (state, progress), or None if there are none.

        A damaged one is named in one line, set aside under another name, and the one before is used.

        Raises:
          UserError: all are damaged (and nothing is touched), or they hold a state of other names, shapes or dtypes.
        """
        damaged = {}
        for step in reversed(self.steps):
            state, progress, damage = self._attempt(step, on_mesh(abstract))
            if not damage:
                self._set_aside(damaged, step)
                return state, progress
            damaged[step] = damage
        if damaged:
            step, damage = next(iter(damaged.items()))
            raise UserError(f'No checkpoint in {self.directory} can be read; step {step}: {damage}.')
        return None

    def wait(self) -> None:
        """Returns when the save under way is complete; raises if it failed or cannot be read back."""
        self._manager.wait_until_finished()
        if self._unchecked:
            (step, shapes), self._unchecked = self._unchecked, None
            _check_complete(self.directory / str(step) / 'state', shapes)

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        with contextlib.closing(self._manager):
            if kind is None:
                self.wait()

    def _read_progress(self, step: int) -> dict[str, Any]:
        return dict(ocp.JsonCheckpointHandler().restore(self.directory / str(step) / 'extras'))

    def _attempt(self, step: int, abstract: Tree) -> tuple[Tree, dict[str, Any], str]:
        """State, progress and '' or what is wrong; all processes come to the same verdict."""
        state, extras, damage = None, {}, ''
        try:
            with _report_corruption(''):
                extras = self._read_progress(step)
                if self._inputs and extras.get('inputs'):
                    check_inputs(str(self.directory / str(step)), self._inputs, extras['inputs'])
                extras = {key: extras[key] for key in ('progress', 'checksums')}
                state = _read(self.directory / str(step) / 'state', abstract)
        except _DamageError as error:
            damage = str(error)
        barrier('checkpoint read')
        if not _everywhere(not damage):
            return None, {}, damage or 'another process could not read its part'
        sums = zip(names(state), checksums(state), extras['checksums'], strict=True)
        wrong = [name for name, now, then in sums if now != then]
        return state, extras['progress'], f'{wrong[0]!r} does not match its checksum' if wrong else ''

    def _set_aside(self, damaged: Mapping[int, str], good: int) -> None:
        for step, damage in damaged.items():
            if jax.process_index() == 0:
                aside = self.directory / f'damaged-{step}'
                copies = len(list(self.directory.glob(f'{aside.name}*')))
                aside = aside.with_name(f'{aside.name}-{copies + 1}') if copies else aside
                (self.directory / str(step)).rename(aside)
                moved = f'Checkpoint {step} is damaged ({damage}): moved to {aside}, continuing from step {good}.'
                print(printable(moved), file=sys.stderr)
            self._retention.losses.pop(step, None)
        if damaged:
            barrier('damaged checkpoints set aside')
            self._manager.reload()


@dataclasses.dataclass
class _Retention:
    """Which checkpoints stay, as Orbax asks for it. `losses` are the held-out losses by step where known."""

    last: int
    best: bool
    every: int
    losses: dict[int, float | None] = dataclasses.field(default_factory=dict)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        keep = set(sorted(steps)[-self.last :])
        if self.every:
            keep |= {step for step in steps if step % self.every == 0}
        known = [step for step in steps if self.losses.get(step) is not None]
        if self.best and known:
            keep.add(min(known, key=lambda step: (self.losses[step], step)))
        return [step in keep for step in steps]


def store_of(directory: Path) -> dict[str, Any]:
    """Where TensorStore finds the arrays of a save: files, or the database that Orbax makes of them."""
    bucket, _, place = str(directory).removeprefix('gs://').partition('/')
    base = (
        {'driver': 'gcs', 'bucket': bucket, 'path': f'{place}/'}
        if is_remote(directory)
        else {'driver': 'file', 'path': f'{directory}/'}
    )
    return {'driver': 'ocdbt', 'base': base} if (directory / 'manifest.ocdbt').exists() else base


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """By the name of each array on disk."""
    leaves = zip(names(tree), jax.tree.leaves(tree), strict=True)
    return {name.replace('/', '.'): tuple(np.shape(leaf)) for name, leaf in leaves}


def _check_complete(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Sees, on the main process, that every piece of every array is there; what is in them is not read.

    Raises:
      UserError: naming the first array that could not be read back.
    """
    if not is_main_process():
        return
    store = ts.KvStore.open(store_of(directory)).result()
    found = collections.Counter(key.decode().rpartition('/')[0] for key in store.list().result())
    for name, shape in shapes.items():
        metadata = store.read(f'{name}/.zarray').result().value
        pieces = math.prod(map(math.ceil, np.divide(shape, json.loads(metadata)['chunks']))) if metadata else 0
        if found[name] < 1 + pieces or not metadata:
            raise UserError(
                f'What was saved in {directory} cannot be read back: of the array {name!r} {max(found[name] - 1, 0)} of {pieces} '
                'pieces are there. Look at the disk and the name of the directory, and run again.'
            )


def checksums(tree: Tree) -> list[int]:
    """One number a leaf: the sum of its bits as integers, modulo 2**32. The same on any mesh, since the order is free.

    TensorStore checks its own indices only: a flipped bit in an array would be restored without a word.
    """
    # One program, and nothing else in flight: many small ones can block each other's threads on faked CPU devices.
    leaves = jax.block_until_ready([_on_device(leaf) for leaf in jax.tree.leaves(tree)])
    return [int(total) for total in jax.device_get(_sums_of_bits(leaves))]


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum_of_bits(leaf) for leaf in leaves]


def _sum_of_bits(x: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)  # eight bytes become two times four
    bits = x.astype(unsigned) if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, unsigned)
    return jnp.sum(bits, dtype=jnp.uint32)


def _on_device(leaf: jax.Array) -> jax.Array:
    offloaded = isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == 'pinned_host'
    return jax.device_put(leaf, leaf.sharding.with_memory_kind('device')) if offloaded else leaf


def _read(directory: Path, abstract: Tree, cast: bool = False) -> Tree:
    # A handler and not a Checkpointer: that one waits for all processes after reading, in vain if one of them failed.
    handler = ocp.StandardCheckpointHandler()
    _check_same(directory, dict(_flat(handler.metadata(directory).tree)), abstract, cast)
    restored = dict(_flat(handler.restore(directory, args=ocp.args.StandardRestore(to_dict(abstract)))))
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in names(abstract)])


def _check_same(directory: Path, stored: Mapping[str, Any], abstract: Tree, cast: bool) -> None:
    wanted = dict(zip(names(abstract), jax.tree.leaves(abstract), strict=True))
    for name, leaf in wanted.items():
        if name not in stored:
            raise UserError(f'{directory} holds no {name!r}; {nearest(name, stored)}')
        ours, theirs = (f'{jnp.dtype(side.dtype).name}{list(side.shape)}' for side in (leaf, stored[name]))
        if leaf.shape != tuple(stored[name].shape) or (ours != theirs and not cast):
            raise UserError(f'{directory}: {name!r} is {theirs}, and {ours} is wanted.')
    if extra := [name for name in stored if name not in wanted]:
        raise UserError(f'{directory} holds {extra[0]!r}, which is unexpected; {nearest(extra[0], wanted)}')


def _flat(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{path}{name}/')
        else:
            yield path + name, value


class _DamageError(UserError):
    """What is stored cannot be read."""


@contextlib.contextmanager
def _report_corruption(sentence: str) -> Iterator[None]:
    """Whatever JSON, TensorStore and Orbax raise inside becomes one error with the first line of theirs.

    Mistakes of the user pass, and so do errors of the device, such as too little memory. Orbax abandons its other
    readers when one fails, and Python would print the death of each.
    """
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    except (UserError, jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        gc.collect()
        reason = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}'
        raise _DamageError(f'{sentence} ({reason}).' if sentence else reason) from None
    finally:
        sys.unraisablehook = hook


def _everywhere(mine: bool) -> bool:
    return mine if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.array(mine))))
