"""Meta's format: consolidated.00.pth, …, one file a model-parallel shard, with params.json and tokenizer.model."""

import contextlib
import dataclasses
import re
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from etils.epath import Path

from llama2_jax.checkpoints.formats.torchfile import TorchFile, tensors_in
from llama2_jax.checkpoints.names import (
    Key,
    as_bytes,
    as_stored,
    cut_axis,
    from_theirs,
    integers,
    their_matrix,
    their_names,
    their_shape,
)
from llama2_jax.checkpoints.source import Source, Stored, Stream, check_tensors, stored_dtype, tokenizer_beside, write_json
from llama2_jax.config import ModelConfig, UserError, check_field, check_value, from_dict, hidden_size, nearest, shown
from llama2_jax.files import create, matching, read_json, write
from llama2_jax.text.template import foreign_format

IGNORED = ('rope.freqs',)  # a buffer that Meta's code recomputes
CONTEXT = 4096  # Meta's params.json does not say it
# Fields of params.json, and ours.
SHAPE = {
    'dim': 'dim',
    'n_layers': 'layers',
    'n_heads': 'heads',
    'n_kv_heads': 'kv_heads',
    'vocab_size': 'vocab_size',
    'max_seq_len': 'context',
    'norm_eps': 'norm_eps',
    'rope_theta': 'rope_theta',
}
RULE = {'multiple_of': (int, 1, 2**20), 'ffn_dim_multiplier': (float, 1e-3, 1e3)}  # of `hidden_size`: types and ranges


def open_meta(path: Path) -> Source:
    """Opens a directory of Meta's.

    Raises:
      UserError: params.json or a shard is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    files = [file for file in matching(path, 'consolidated.*.pth') if re.fullmatch(r'consolidated\.\d+\.pth', file.name)]
    for number, file in enumerate(files):
        if file.name != (wanted := f'consolidated.{number:02d}.pth'):
            raise UserError(f'{path} has {file.name} but no {wanted}: a shard is missing.')
    if not files:
        raise UserError(f'{path} has no consolidated.00.pth.')
    shards = [{name: stored for name, stored in tensors_in(file).items() if name not in IGNORED} for file in files]
    config = _read_params(path, shards[0])
    check_shards(config, len(files), str(path))
    wanted = their_names(config, 'head_DV', 'meta')
    for shard, file in zip(shards, files, strict=True):
        check_tensors(shard, wanted, config, len(files), file)
    dtype, notes = stored_dtype(path, [stored for shard in shards for stored in shard.values()])
    return Source(
        path,
        'meta',
        config,
        dtype,
        'head_DV',
        partial(_read, {key: [shard[name] for shard in shards] for name, key in wanted.items()}, config),
        partial(tokenizer_beside, path, path.parent),  # Meta's own download has it there
        {'stage': 'convert', 'parent': str(path), 'step': None},
        notes=notes,
        prompts=foreign_format(None, path.name, str(path)),
    )


def _read(tensors: dict[Key, list[Stored]], config: ModelConfig, name: str, layer: int | None) -> np.ndarray:
    parts, axis = tensors[name, layer], cut_axis(name)
    if axis is None or len(parts) == 1:
        matrix = parts[0].read()
        for part in parts[1:]:
            if matrix.tobytes() != part.read().tobytes():
                raise UserError(f'{part.path} and {parts[0].path} hold different values of {name!r}, of which each has a copy.')
    else:
        matrix = np.concatenate([integers(part.read()) for part in parts], axis).view(parts[0].dtype)
    return from_theirs(name, matrix, config, 'meta')


def _read_params(path: Path, tensors: dict[str, Stored]) -> ModelConfig:
    file = path / 'params.json'
    params = {name: value for name, value in read_json(file).items() if value is not None}
    known = {*SHAPE, *RULE}
    if unknown := [name for name, value in params.items() if name not in known and value not in (False, 0)]:
        raise UserError(f'{file}: field {shown(unknown[0])} is not of a LLaMA 2 model; {nearest(unknown[0], known)}')
    for name in ('dim', 'n_layers', 'n_heads'):
        if name not in params:
            raise UserError(f'{file}: field {name!r} is missing.')
    if params.get('vocab_size', -1) == -1:  # Meta's code takes it from the tokenizer
        table = tensors.get('tok_embeddings.weight')
        if table is None or not table.shape:
            raise UserError(f"{path}: no tensor 'tok_embeddings.weight', and params.json does not tell the vocabulary's size.")
        params['vocab_size'] = table.shape[0]
    fields = {field.name: field for field in dataclasses.fields(ModelConfig)}
    for theirs, ours in SHAPE.items():
        if theirs in params:
            check_field(f'{file}: {theirs}', params[theirs], fields[ours])
    for theirs, limits in RULE.items():
        if theirs in params:
            check_value(f'{file}: {theirs}', params[theirs], *limits)
    dim, heads = params['dim'], params['n_heads']
    hidden = hidden_size(dim, params.get('multiple_of', 256), params.get('ffn_dim_multiplier'))
    values = {'kv_heads': heads, 'head_dim': dim // heads, 'hidden': hidden, 'context': CONTEXT}
    values |= {ours: params[theirs] for theirs, ours in SHAPE.items() if theirs in params}
    return from_dict(ModelConfig, values, str(file))


def check_shards(config: ModelConfig, shards: int, where: str) -> None:
    """Raises a UserError where a model cannot be cut into so many shards."""
    sizes = {name: getattr(config, name) for name in ('heads', 'kv_heads', 'hidden', 'dim', 'vocab_size')}
    for name, size in sizes.items():
        if size % shards:
            raise UserError(f'{where}: model.{name}={size} cannot be cut into {shards} shards.')


def write_meta(path: Path, model: Source, dtype: np.dtype, stream: Stream, shards: int) -> None:
    """Writes a directory of Meta's.

    Args:
      path: exists and is empty.
      model: for all but the tensors.
      dtype: of the tensors.
      stream: the tensors.
      shards: model-parallel shards.

    Raises:
      UserError: the model cannot be cut so, or its head size is not the one that Meta's code takes.
    """
    config = model.config
    params = make_params(config)
    check_shards(config, shards, f'--shards={shards}')
    shapes = {name: their_shape(key[0], config, shards) for name, key in their_names(config, model.head, 'meta').items()}
    with contextlib.ExitStack() as stack:
        names = [f'consolidated.{i:02d}' for i in range(shards)]
        outputs = [stack.enter_context(create(path / f'{name}.pth')) for name in names]
        files = [TorchFile(output, name, shapes, dtype) for output, name in zip(outputs, names, strict=True)]
        for _, cuts in stream(partial(_cut, config, shards)):
            for file, (part, checksum) in zip(files, cuts, strict=True):
                file.write(part, checksum)
        for file in files:
            file.finish()
    write(path / 'tokenizer.model', model.tokenizer())
    write_json(path / 'params.json', params)


def _cut(config: ModelConfig, shards: int, name: str, array: np.ndarray) -> list[Callable[[], tuple[np.ndarray, int]]]:
    """Calls that give what each shard holds of a parameter: bytes, and their checksum."""
    matrix, axis = their_matrix(name, array, config), cut_axis(name)

    def content(cut: np.ndarray) -> tuple[np.ndarray, int]:
        stored = as_bytes(as_stored(name, cut, config, 'meta'))
        return stored, zlib.crc32(stored)

    return [partial(content, cut) for cut in ([matrix] * shards if axis is None else np.split(matrix, shards, axis))]


def make_params(config: ModelConfig) -> dict[str, Any]:
    """The content of params.json.

    >>> make_params(MODELS['70b'])['multiple_of'], make_params(MODELS['70b'])['ffn_dim_multiplier']
    (4096, 1.3)

    Raises:
      UserError: the head size is not dim / heads.
    """
    if config.heads * config.head_dim != config.dim:
        raise UserError(
            f"Meta's format cannot hold model.head_dim={config.head_dim}: it takes dim / heads = {config.dim}/{config.heads}."
        )
    multiplier, multiple_of = _rule_for(config.dim, config.hidden)
    params = {
        'dim': config.dim,
        'n_layers': config.layers,
        'n_heads': config.heads,
        'n_kv_heads': config.kv_heads,
        'vocab_size': config.vocab_size,
        'multiple_of': multiple_of,
        'norm_eps': config.norm_eps,
    }
    if multiplier is not None:
        params['ffn_dim_multiplier'] = multiplier
    if config.rope_theta != 10_000:  # LLaMA 2's code has no such field; Code Llama's has
        params['rope_theta'] = config.rope_theta
    return params


def _rule_for(dim: int, hidden: int) -> tuple[float | None, int]:
    """Multiplier and multiple that make `hidden`: those of the published models where they do."""
    for multiplier, multiple_of in [(None, 256), (1.3, 4096), *((None, 2**i) for i in range(12, -1, -1))]:
        if hidden_size(dim, multiple_of, multiplier) == hidden:
            return multiplier, multiple_of
    return (hidden + 0.5) / int(8 * dim / 3), 1
