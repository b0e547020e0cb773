"""The model directory that every stage writes and reads: config.json, tokenizer.model and params/ (Orbax, for any mesh)."""

import dataclasses
import json
import shutil
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from llama2_jax.config import ModelConfig, UserError, from_dict
from llama2_jax.convert.names import BLOCK, HEADS, contiguous, keys, shape
from llama2_jax.convert.source import DTYPES, Source, Stream, common_dtype, nearest_name, read_json, tokenizer_beside, write_json
from llama2_jax.model.llama import Trunk
from llama2_jax.runtime import barrier, is_main_process
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.checkpoint import CHUNK_BYTES, save_params


def save_model(directory: str | Path, model: Trunk, tokenizer: Tokenizer, provenance: dict[str, Any]) -> None:
    """Writes a model directory, whole or not at all, in place of what is there; every process calls it.

    Args:
      directory: `model/` of a workdir, say.
      model: parameters of a language model or reward model, on any mesh.
      tokenizer: copied beside them.
      provenance: stage, parent and step, for config.json; of a reward model also its scores' shift, mean and std.

    Raises:
      UserError: no space is left.
    """
    directory = Path(directory).absolute()
    new = directory.with_name(directory.name + '.new')
    if is_main_process():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    barrier('model directory made')
    save_params(new / 'params', model)
    if is_main_process():
        _write_rest(new, model.config, tokenizer.model, provenance)
        old = directory.with_name(directory.name + '.old')
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            directory.rename(old)
        new.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    barrier('model directory written')


def _write_rest(directory: Path, config: ModelConfig, tokenizer: bytes, provenance: Any) -> None:
    (directory / 'tokenizer.model').write_bytes(tokenizer)
    write_json(directory / 'config.json', {'model': dataclasses.asdict(config), 'provenance': dict(provenance)})


def read_config(directory: Path) -> ModelConfig:
    """The model's shape from a model directory.

    Raises:
      UserError: there is none, or a field is unknown, missing or of another type.
    """
    path = directory / 'config.json'
    if not path.is_file():
        raise UserError(f'{directory} is not a model directory: it has no config.json.')
    if (directory / 'model' / 'params').is_dir():
        raise UserError(f'{directory} is the directory of a run; its model is {directory / "model"}.')
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        return from_dict(ModelConfig, content['model'], str(path))
    except (ValueError, KeyError, TypeError):
        raise UserError(f'{path} is damaged, or not the config.json of a model directory: it has no "model" section.') from None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises a UserError where tokenizer and model disagree on the number of pieces."""
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f'{tokenizer.path} has {tokenizer.vocab_size} pieces, and the model has model.vocab_size={vocab_size}.')


def open_orbax(path: Path) -> Source:
    """Opens a model directory, to be read layer by layer.

    Raises:
      UserError: something is missing or damaged, or an array is missing, unknown or of another shape.
    """
    config = read_config(path)
    params = path / 'params'
    if not params.is_dir():
        raise UserError(f'There are no parameters to read: {params} does not exist.')
    try:
        listed = ts.KvStore.open(_store(params)).result().list().result()
        names = [key.decode().removesuffix('/.zarray') for key in listed if key.endswith(b'/.zarray')]
        arrays = {name.rpartition('.')[2]: ts.open(_array(params, name), open=True).result() for name in names}
    except ValueError as error:
        raise _damage(params, error) from None
    head = next((name for name in HEADS if name in arrays), 'head_DV')
    wanted = dict.fromkeys(name for name, _ in keys(config, head))
    for name in arrays:
        if name not in wanted:
            raise UserError(f'{params} holds {name!r}, which is not wanted; {nearest_name(name, wanted)}')
    for name in wanted:
        if name not in arrays:
            raise UserError(f'{params} holds no {name!r}; {nearest_name(name, arrays)}')
        full = (config.layers, *shape(name, config)) if name in BLOCK else shape(name, config)
        if arrays[name].shape != full:
            raise UserError(f'{params}: {name!r} has the shape {list(arrays[name].shape)}, not {list(full)}.')
        if (dtype := arrays[name].dtype.numpy_dtype) not in DTYPES.values():
            raise UserError(f'{params}: {name!r} is of {dtype}; valid: {", ".join(DTYPES)}.')

    def read(name: str, layer: int | None) -> np.ndarray:
        array = arrays[name] if layer is None else arrays[name][layer]
        try:
            return array.read().result()
        except ValueError as error:
            raise _damage(params, error) from None

    dtype = common_dtype(array.dtype.numpy_dtype for array in arrays.values())
    provenance = read_json(path / 'config.json').get('provenance') or {}
    return Source(path, 'orbax', config, dtype, head, read, partial(tokenizer_beside, path), provenance)


def write_orbax(path: Path, model: Source, dtype: np.dtype, stream: Stream) -> None:
    """Writes a model directory, one layer's tensor at a time, which Orbax itself does not: it wants whole arrays in memory.

    The arrays go through TensorStore into the files that Orbax would write, with its metadata; Orbax restores them.

    Args:
      path: exists and is empty.
      model: for all but the tensors.
      dtype: of the tensors.
      stream: the tensors.
    """
    config, params = model.config, path / 'params'
    layers = {name: config.layers if name in BLOCK else None for name, _ in keys(config, model.head)}
    context = ts.Context()  # one, or every array would keep an index of its own and overwrite the others'
    arrays = {name: _create(params, name, count, shape(name, config), dtype, context) for name, count in layers.items()}
    under_way: deque[ts.WriteFutures] = deque()
    try:
        for (name, layer), array in stream(lambda _, array: contiguous(array)):
            target = arrays[name] if layer is None else arrays[name][layer]
            under_way.append(target.write(array, can_reference_source_data_indefinitely=True))
            if len(under_way) > 1:
                under_way.popleft().result()
        while under_way:
            under_way.popleft().result()
    finally:
        for write in under_way:  # after an error: nothing may write while the directory is removed
            write.exception()
    entries = {}
    for name, array in arrays.items():
        parts = _dotted(name).split('.')
        key = f'({", ".join(map(repr, parts))}{"," if len(parts) == 1 else ""})'
        entries[key] = {
            'key_metadata': [{'key': part, 'key_type': 2} for part in parts],
            'value_metadata': {'value_type': 'jax.Array', 'skip_deserialize': False, 'write_shape': list(array.shape)},
        }
    metadata = {'tree_metadata': entries, 'use_ocdbt': True, 'use_zarr3': False, 'custom_metadata': None}
    write_json(params / '_METADATA', metadata | {'store_array_data_equal_to_fill_value': True})
    handler = 'orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler'
    now = time.time_ns()
    stamps = {'init_timestamp_nsecs': now, 'commit_timestamp_nsecs': now}
    write_json(params / '_CHECKPOINT_METADATA', {'item_handlers': handler, 'metrics': {}, 'custom_metadata': {}} | stamps)
    _write_rest(path, config, model.tokenizer(), model.provenance)


def _dotted(name: str) -> str:
    """An array's name on disk."""
    return f'blocks.{name}' if name in BLOCK else name


def _store(params: Path) -> dict[str, Any]:
    return {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{params.absolute()}/'}}


def _array(params: Path, dotted: str) -> dict[str, Any]:
    return {'driver': 'zarr', 'kvstore': _store(params) | {'path': f'{dotted}/'}}


def _create(
    params: Path, name: str, layers: int | None, shape: tuple[int, ...], dtype: np.dtype, context: ts.Context
) -> ts.TensorStore:
    """A new array, in pieces of a layer or, where that is large, of parts along its first axis."""
    row = int(np.prod(shape[1:])) * dtype.itemsize
    rows = next((n for n in range(shape[0], 0, -1) if shape[0] % n == 0 and n * row <= CHUNK_BYTES), 1)
    stacked = () if layers is None else (layers,)
    metadata = {
        'shape': [*stacked, *shape],
        'chunks': [*(1 for _ in stacked), rows, *shape[1:]],
        'dtype': 'bfloat16' if dtype.name == 'bfloat16' else dtype.str,
        'compressor': None,  # random-looking numbers shrink by a tenth, and take several times as long to write
    }
    spec = _array(params, _dotted(name)) | {'metadata': metadata, 'store_data_equal_to_fill_value': True}
    return ts.open(spec, create=True, context=context).result()


def _damage(params: Path, error: Exception) -> UserError:
    reason = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}'
    return UserError(f'The parameters in {params} are damaged or incomplete ({reason}).')
