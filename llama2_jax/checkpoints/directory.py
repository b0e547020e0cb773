"""The model directory that every stage writes and reads: config.json, tokenizer.model and params/ (Orbax, for any mesh)."""

import dataclasses
import itertools
import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import tensorstore as ts
from etils.epath import Path

from llama2_jax.checkpoints.names import BLOCK, HEADS, in_parts, keys, shape
from llama2_jax.checkpoints.source import (
    DTYPES,
    Source,
    Stream,
    check_stop_ids,
    common_dtype,
    nearest_name,
    tokenizer_beside,
    write_json,
)
from llama2_jax.config import ModelConfig, UserError, from_dict, nearest, shown
from llama2_jax.files import check_name, check_regular, is_remote, locate, read_into, read_json, size_of, write
from llama2_jax.model.llama import Transformer
from llama2_jax.runtime import barrier, is_main_process
from llama2_jax.text.template import SPACES, PromptFormat
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.checkpoint import CHUNK_BYTES, save_params, store_of

CHAT_STAGES = ('sft', 'reward', 'rejection', 'ppo', 'ghost', 'distill')  # of models saved before config.json had `prompts`


def save_model(
    directory: str | os.PathLike, model: Transformer, tokenizer: Tokenizer, provenance: dict[str, Any], chat: bool = False
) -> None:
    """Writes a model directory, whole or not at all, in place of what is there; every process calls it.

    Args:
      directory: `model/` of a workdir, say.
      model: parameters of a language model or reward model, on any mesh.
      tokenizer: copied beside them.
      provenance: stage, parent and step, for config.json; of a reward model also its scores' shift, mean and std.
      chat: whether it was trained on LLaMA 2's chat format, which its prompts then have.

    Raises:
      UserError: no space is left.
    """
    directory = locate(directory)
    check_name(directory)  # before anything is removed
    new = directory if is_remote(directory) else directory.with_name(directory.name + '.new')
    if is_main_process():
        if is_remote(directory):  # nothing can be renamed there: without its config.json, which comes last, it is no model
            (directory / 'config.json').unlink(missing_ok=True)
        else:
            new.rmtree(missing_ok=True)
            new.mkdir(parents=True)
    barrier('model directory made')
    save_params(new / 'params', model)
    if is_main_process():
        _write_rest(new, model.config, tokenizer, provenance, PromptFormat(chat))
        if new != directory:
            old = directory.with_name(directory.name + '.old')
            old.rmtree(missing_ok=True)
            if directory.exists():
                directory.rename(old)
            new.rename(directory)
            old.rmtree(missing_ok=True)
    barrier('model directory written')


def is_saved(directory: str | os.PathLike) -> bool:
    """Whether `save_model` has written a model there, to its end."""
    return (locate(directory) / 'config.json').exists()


def _write_rest(directory: Path, config: ModelConfig, tokenizer: Tokenizer, provenance: Any, prompts: PromptFormat) -> None:
    write(directory / 'tokenizer.model', tokenizer.model)
    content = {'model': dataclasses.asdict(config), 'prompts': dataclasses.asdict(prompts), 'provenance': dict(provenance)}
    if tokenizer.stop_ids:
        content['stop_ids'] = list(tokenizer.stop_ids)
    if tokenizer.padded_vocab_size:
        content['padded_vocab_size'] = tokenizer.padded_vocab_size
    write_json(directory / 'config.json', content)


def read_config(directory: Path) -> ModelConfig:
    """The model's shape from a model directory.

    Raises:
      UserError: there is none, or a field is unknown, missing or of another type.
    """
    return _read_config(directory)[0]


def _read_config(directory: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's shape, and the whole content of config.json."""
    path = directory / 'config.json'
    if not path.exists():
        raise UserError(f'{directory} is not a model directory: it has no config.json.')
    if (directory / 'model' / 'params').is_dir():
        raise UserError(f'{directory} is the directory of a run; its model is {directory / "model"}.')
    content = read_json(path)
    for section in ('model', 'provenance'):
        if not isinstance(content.get(section, {}), dict):
            raise UserError(f'{path}: {section!r} is {shown(content[section])}, not an object.')
    if 'model' not in content:
        raise UserError(f'{path} is not the config.json of a model directory: it has no "model" section.')
    return from_dict(ModelConfig, content['model'], str(path)), content


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises a UserError where tokenizer and model disagree on the number of pieces."""
    if tokenizer.vocab_size != vocab_size:
        raise UserError(f'{tokenizer.path} has {tokenizer.vocab_size} pieces, and the model has model.vocab_size={vocab_size}.')


def open_orbax(path: Path) -> Source:
    """Opens a model directory, to be read layer by layer.

    Raises:
      UserError: something is missing or damaged, or an array is missing, unknown or of another shape.
    """
    config, content = _read_config(path)
    params = path / 'params'
    if not params.is_dir():
        raise UserError(f'There are no parameters to read: {params} does not exist.')
    check_regular(params)
    try:
        store = store_of(params)
        listed = ts.KvStore.open(store).result().list().result()
        names = [key.decode().removesuffix('/.zarray') for key in listed if key.endswith(b'/.zarray')]
        for name in names if 'base' not in store else ():
            _check_zarray(params / name / '.zarray')
        specs = {name: {'driver': 'zarr', 'kvstore': store | {'path': f'{store.get("path", "")}{name}/'}} for name in names}
        arrays = {name.rpartition('.')[2]: ts.open(spec, open=True).result() for name, spec in specs.items()}
    except ValueError as error:
        raise _damage(params, error) from None
    head = next((name for name in HEADS if name in arrays), 'head_DV')
    wanted = dict.fromkeys(name for name, _ in keys(config, head))
    for name in arrays:
        if name not in wanted:
            raise UserError(f'{params} holds {name!r}, which is unexpected; {nearest_name(name, wanted)}')
    for name in wanted:
        if name not in arrays:
            raise UserError(f'{params} holds no {name!r}; {nearest_name(name, arrays)}')
        full = (config.layers, *shape(name, config)) if name in BLOCK else shape(name, config)
        if arrays[name].shape != full:
            raise UserError(f'{params}: {name!r} has the shape {shown(list(arrays[name].shape))}, not {list(full)}.')
        if (dtype := arrays[name].dtype.numpy_dtype) not in DTYPES.values():
            raise UserError(f'{params}: {name!r} is of {dtype}; valid: {", ".join(DTYPES)}.')
    _check_chunks(params, arrays, names, {key.decode() for key in listed})

    rows = {} if 'base' in store else {name: _plain_rows(params / _dotted(name), shape(name, config)) for name in wanted}

    def read(name: str, layer: int | None) -> np.ndarray:
        array = arrays[name] if layer is None else arrays[name][layer]
        try:
            if not rows.get(name):
                return array.read().result()
            out = np.empty(array.shape, array.dtype.numpy_dtype)
            for number, start in enumerate(range(0, len(out), rows[name])):
                piece = out[start : start + rows[name]].reshape(-1).view(np.uint8)
                file = params / _dotted(name) / _piece(layer, number, out.ndim)
                if not is_remote(file) and size_of(file) != piece.size:
                    raise UserError(f'{file} is damaged: it has {size_of(file)} bytes, not {piece.size}.')
                read_into(file, 0, piece)
            return out
        except (ValueError, OSError) as error:
            raise _damage(params, error) from None

    dtype = common_dtype(array.dtype.numpy_dtype for array in arrays.values())
    stop_ids = check_stop_ids(f'{path / "config.json"}: stop_ids', content.get('stop_ids'), config.vocab_size)
    tokenizer = partial(tokenizer_beside, path)
    provenance, prompts = content.get('provenance', {}), _prompts(path, content)
    padded = content.get('padded_vocab_size', 0)
    if type(padded) is not int or (padded and not config.vocab_size < padded < 2**31):
        raise UserError(f'{path / "config.json"}: padded_vocab_size is {shown(padded)}, not more than {config.vocab_size}.')
    return Source(path, 'orbax', config, dtype, head, read, tokenizer, provenance, stop_ids, prompts=prompts, padded=padded)


def _prompts(path: Path, content: Mapping[str, Any]) -> PromptFormat:
    if 'prompts' not in content:
        provenance = content.get('provenance', {})
        stage, parent = str(provenance.get('stage', '')), os.path.basename(str(provenance.get('parent')))
        return PromptFormat('chat' in parent.lower() if stage == 'convert' else stage.startswith(CHAT_STAGES))
    where = f'{path / "config.json"}: prompts'
    prompts = from_dict(PromptFormat, content['prompts'], where)
    if prompts.spaces not in SPACES:
        raise UserError(f'{where}.spaces is {shown(prompts.spaces)}; {nearest(prompts.spaces, SPACES)}')
    return prompts


def _check_zarray(path: Path) -> None:
    """Raises a UserError where chunks are larger than the array: TensorStore would end the process for lack of memory."""
    content = read_json(path)
    shape, chunks = content.get('shape'), content.get('chunks')
    if not isinstance(shape, list) or not isinstance(chunks, list) or len(shape) != len(chunks):
        raise UserError(f'{path} is damaged: its shape {shown(shape)} and its chunks {shown(chunks)} do not belong together.')
    for size, chunk in zip(shape, chunks, strict=True):
        if type(size) is not int or type(chunk) is not int or not 1 <= chunk <= size < 2**31:
            raise UserError(f'{path} is damaged: its chunks {shown(chunks)} are not parts of its shape {shown(shape)}.')


def _check_chunks(params: Path, arrays: dict[str, Any], names: list[str], listed: set[str]) -> None:
    """Raises a UserError where a chunk of an array is missing: TensorStore would give zeros in its place."""
    for full in names:
        name = full.rpartition('.')[2]
        metadata = arrays[name].spec().to_json()['metadata']
        separator = metadata.get('dimension_separator', '.')
        counts = [range(-(-size // chunk)) for size, chunk in zip(metadata['shape'], metadata['chunks'], strict=True)]
        for place in itertools.product(*counts):
            if (chunk := f'{full}/{separator.join(map(str, place))}') not in listed:
                raise UserError(f'The parameters in {params} are damaged or incomplete: {chunk} is missing.')


def write_orbax(path: Path, model: Source, dtype: np.dtype, stream: Stream) -> None:
    """Writes a model directory, one layer's tensor at a time, which Orbax itself does not: it wants whole arrays in memory.

    The arrays are plain files of Zarr's, with Orbax's metadata, and Orbax restores them.

    Args:
      path: exists and is empty.
      model: for all but the tensors.
      dtype: of the tensors.
      stream: the tensors.
    """
    config, params = model.config, path / 'params'
    params.mkdir()
    pieces, entries = {}, {}
    for name in dict.fromkeys(name for name, _ in keys(config, model.head)):
        stacked, one = (config.layers,) if name in BLOCK else (), shape(name, config)
        pieces[name] = rows = _rows(one, dtype)
        (params / _dotted(name)).mkdir()
        _write_zarray(params / _dotted(name), (*stacked, *one), (*(1 for _ in stacked), rows, *one[1:]), dtype)
        parts = _dotted(name).split('.')
        entries[str(tuple(parts))] = {
            'key_metadata': [{'key': part, 'key_type': 2} for part in parts],
            'value_metadata': {'value_type': 'jax.Array', 'skip_deserialize': False, 'write_shape': [*stacked, *one]},
        }
    for (name, layer), made in stream(lambda name, array: in_parts(array, pieces[name])):
        for number, piece in enumerate(made):
            write(params / _dotted(name) / _piece(layer, number, len(shape(name, config))), piece)
    metadata = {'tree_metadata': entries, 'use_ocdbt': False, 'use_zarr3': False, 'custom_metadata': None}
    write_json(params / '_METADATA', metadata | {'store_array_data_equal_to_fill_value': True})
    handler = 'orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler'
    now = time.time_ns()
    stamps = {'init_timestamp_nsecs': now, 'commit_timestamp_nsecs': now}
    write_json(params / '_CHECKPOINT_METADATA', {'item_handlers': handler, 'metrics': {}, 'custom_metadata': {}} | stamps)
    tokenizer = Tokenizer.from_bytes(model.tokenizer(), path, model.stop_ids)
    tokenizer.padded_vocab_size = model.padded
    _write_rest(path, config, tokenizer, model.provenance, model.prompts)


def _dotted(name: str) -> str:
    """An array's name on disk."""
    return f'blocks.{name}' if name in BLOCK else name


def _piece(layer: int | None, number: int, axes: int) -> str:
    """The file of one piece of a layer's parameter with so many axes."""
    return '.'.join(map(str, (*(() if layer is None else (layer,)), number, *[0] * (axes - 1))))


def _plain_rows(directory: Path, shape: tuple[int, ...]) -> int:
    """How many rows each piece has, where these are the bare numbers (TensorStore takes three times as long); else 0."""
    content = read_json(directory / '.zarray')
    chunks = content['chunks'][-len(shape) :]
    bare = (content['compressor'], content['filters'], content['order'], content.get('dimension_separator', '.'))
    return chunks[0] if bare == (None, None, 'C', '.') and tuple(chunks[1:]) == shape[1:] and not shape[0] % chunks[0] else 0


def _rows(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Into pieces of how many rows a layer's parameter is cut: all, or where that is large a part of them."""
    row = int(np.prod(shape[1:])) * dtype.itemsize
    return next((n for n in range(shape[0], 0, -1) if shape[0] % n == 0 and n * row <= CHUNK_BYTES), 1)


def _write_zarray(directory: Path, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: np.dtype) -> None:
    content = {
        'zarr_format': 2,
        'shape': shape,
        'chunks': chunks,
        'dtype': 'bfloat16' if dtype.name == 'bfloat16' else dtype.str,
        'compressor': None,  # random-looking numbers shrink by a tenth, and take several times as long to write
        'fill_value': None,
        'filters': None,
        'order': 'C',
        'dimension_separator': '.',
    }
    write_json(directory / '.zarray', content)


def _damage(params: Path, error: Exception) -> UserError:
    reason = f'{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}'
    return UserError(f'The parameters in {params} are damaged or incomplete ({reason}).')
