"""Models of any format onto the mesh: `load_model` for stages and tools, `open_model` for what reads tensor by tensor."""

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils.epath import Path

from llama2_jax.checkpoints.directory import check_vocabulary, open_orbax
from llama2_jax.checkpoints.formats.gguf_header import MAGIC as GGUF_MAGIC
from llama2_jax.checkpoints.formats.huggingface import open_huggingface
from llama2_jax.checkpoints.formats.llamacpp import open_gguf
from llama2_jax.checkpoints.formats.meta import open_meta
from llama2_jax.checkpoints.formats.pieces import AddedToken, with_added
from llama2_jax.checkpoints.names import BLOCK
from llama2_jax.checkpoints.source import DTYPES, Source
from llama2_jax.config import MODELS, ModelConfig, UserError
from llama2_jax.files import bucket_errors, locate, matching, open_file, read_json
from llama2_jax.mesh import parameter_name
from llama2_jax.model.llama import Llama
from llama2_jax.model.reward import ScoreModel, with_score
from llama2_jax.runtime import log
from llama2_jax.text.tokenizer import Tokenizer
from llama2_jax.train.checkpoint import load_params, on_mesh

MAX_PADDING = 1024  # rows of a vocabulary beyond those of the tokenizer; with more of them it is another tokenizer's


def open_model(path: str | os.PathLike, keep_padding: bool = False) -> Source:
    """Opens a model directory, one of Hugging Face's or of Meta's, or a .gguf file; which it is shows in what it holds.

    Args:
      path: of the directory or file.
      keep_padding: keeps the rows of the vocabulary that the tokenizer has no piece for, and gives them pieces that no text has.

    Raises:
      UserError: it is none of them, or its reader found something missing, damaged or unknown.
    """
    with bucket_errors(path):
        source = _open(locate(path))
        return source if source.form == 'orbax' else _match_vocabulary(source, keep_padding)


def _match_vocabulary(source: Source, keep_padding: bool) -> Source:
    """The model with as many rows as pieces: further rows pad the vocabulary to a round number, or are for a token that pads."""
    try:
        content = source.tokenizer()
        pieces = Tokenizer.from_bytes(content).vocab_size
    except UserError:
        return source  # the tokenizer is checked by what uses it
    size = source.config.vocab_size
    if not 0 < size - pieces <= MAX_PADDING:
        return source
    if keep_padding:
        unnamed = {i: AddedToken(f'<|padding_{i}|>', special=True) for i in range(pieces, size)}
        wide = with_added(content, unnamed | dict(source.added), size)
        return dataclasses.replace(source, tokenizer=lambda: wide)
    if any(stop >= pieces for stop in source.stop_ids):
        raise UserError(
            f'{source.path} ends its texts with token {max(source.stop_ids)}, its tokenizer has {pieces} pieces, and no '
            'file names the tokens between: add an added_tokens.json, {"text of the token": id, …}.'
        )

    def read(name: str, layer: int | None) -> np.ndarray:
        array = source.read(name, layer)
        return array[:pieces] if name == 'table_VD' else array[:, :pieces] if name == 'head_DV' else array

    note = f'{source.path}: the vocabulary of {size} is cut to the {pieces} pieces of its tokenizer.'
    config = dataclasses.replace(source.config, vocab_size=pieces)
    return dataclasses.replace(source, config=config, read=read, notes=(*source.notes, note), padded=size)


def with_padding(source: Source) -> Source:
    """The model with as many rows in its vocabulary as before `open_model` cut it; like those of <unk>, so none is drawn."""
    more, unk_id = source.padded - source.config.vocab_size, tokenizer_of(source).unk_id

    def read(name: str, layer: int | None) -> np.ndarray:
        array = source.read(name, layer)
        if name not in ('table_VD', 'head_DV'):
            return array
        axis = 0 if name == 'table_VD' else 1
        return np.concatenate([array, np.repeat(array.take([unk_id], axis), more, axis)], axis)

    config = dataclasses.replace(source.config, vocab_size=source.padded)
    return dataclasses.replace(source, config=config, read=read)


def check_given(option: str, model: str) -> None:
    """Raises a UserError where an option names no model to begin with, or a size, which has no weights."""
    if not model or (model in MODELS and not locate(model).exists()):
        why = 'is a size, which is enough for --dry_run only' if model else 'names no model'
        raise UserError(f'{option}={model} {why}: give a model directory.')


def shape_of(model: str) -> ModelConfig:
    """The shape of a size such as '7b', or of any model."""
    return MODELS[model] if model in MODELS else open_model(model).config


def _open(path: Path) -> Source:
    if not path.exists():
        raise UserError(f'There is no model at {path}.')
    if not path.is_dir():
        with open_file(path) as file:
            magic = file.read(4)
        if magic != GGUF_MAGIC:  # whatever its name is: those of Ollama have none
            raise UserError(f'{path} is not a model: the one format that is a single file is GGUF, and this is not one.')
        return open_gguf(path)
    if matching(path, 'consolidated.*.pth'):
        return open_meta(path)
    if (path / 'config.json').exists():
        return open_huggingface(path) if 'model_type' in read_json(path / 'config.json') else open_orbax(path)
    if (path / 'adapter_config.json').exists():
        raise UserError(
            f'{path} holds an adapter of peft, not a model: merge it into the model that it was trained on, '
            f'convert --input=MODEL --adapter={path} --output=MERGED.'
        )
    if files := matching(path, '*.gguf'):
        raise UserError(f'{path} holds {files[0].name}: give the file itself.')
    raise UserError(f'{path} is not a model directory: it has no config.json, consolidated.*.pth or .gguf file.')


def open_language_model(path: str | os.PathLike) -> Source:
    """`open_model`, which raises a UserError for a reward model, too."""
    source = open_model(path)
    if source.head != 'head_DV':
        raise UserError(f'{path} is a reward model: it gives scores, not next tokens.')
    return source


def load_model(path: str | os.PathLike, dtype: str | None = None, context: int = 0) -> tuple[Llama, Tokenizer]:
    """A language model of any format, cut over the mesh that is set, and its tokenizer. Every process calls it.

    Args:
      path: as for `open_model`.
      dtype: of the parameters, such as 'float32' for training; None keeps that of the files.
      context: another one than the model has, to train it on longer texts; 0: its own.

    Raises:
      UserError: what `open_model` raises, a reward model, or a tokenizer that does not belong to the model.
    """
    source = open_language_model(path)
    if context:
        source = dataclasses.replace(source, config=dataclasses.replace(source.config, context=context))
    return _load(source, Llama, dtype)


def load_score_model(path: str | os.PathLike, dtype: str | None = None) -> tuple[ScoreModel, Tokenizer]:
    """A reward model or value model, as `load_model` reads a language model. The shift of its scores is not applied.

    Raises:
      UserError: what `open_model` raises, a language model, or a tokenizer that does not belong to the model.
    """
    source = open_model(path)
    if source.head != 'score_D':
        raise UserError(f'{path} is a language model: it gives next tokens, not scores.')
    return _load(source, ScoreModel, dtype)


def load_with_score(path: str | os.PathLike, seed: int) -> ScoreModel:
    """A reward model in float32, or a language model under a new score head."""
    if open_model(path).head == 'score_D':
        return load_score_model(path, 'float32')[0]
    return with_score(load_model(path, 'float32')[0], jax.random.key(seed))


def _load(source: Source, kind: type, dtype: str | None) -> tuple[Any, Tokenizer]:
    tokenizer = announced(source)
    abstract = jax.eval_shape(partial(kind, source.config), jax.random.key(0))
    with bucket_errors(source.path):
        return load_tree(source, abstract, DTYPES[dtype] if dtype else source.dtype), tokenizer


def announced(source: Source) -> Tokenizer:
    """`tokenizer_of` a model that is about to be read; prints how it is read."""
    tokenizer = tokenizer_of(source)
    for note in source.notes:
        log(note)
    return tokenizer


def tokenizer_of(source: Source) -> Tokenizer:
    """The tokenizer of an opened model.

    Raises:
      UserError: there is none, or it has another number of pieces than the model.
    """
    files = [source.path / name for name in ('tokenizer.model', 'tokenizer.json')]
    file = next((file for file in files if file.is_file()), source.path)
    tokenizer = Tokenizer.from_bytes(source.tokenizer(), file, source.stop_ids)
    check_vocabulary(tokenizer, source.config.vocab_size)
    tokenizer.padded_vocab_size = source.padded
    return tokenizer


def load_tree(source: Source, abstract: Any, dtype: np.dtype) -> Any:
    """The parameters as the tree and onto the shardings of `abstract`, whose leaves are named as in `names.TABLE`.

    A model directory is read by Orbax, each host its own parts. Of other formats a host holds one layer's tensor at a time.
    """
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), on_mesh(abstract))
    if source.form == 'orbax':
        return load_params(source.path / 'params', abstract, cast=True)

    def load(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = parameter_name(path)
        if name not in BLOCK:
            return _place(source.read(name, None), leaf.sharding).astype(dtype)
        stack = jax.jit(partial(jnp.zeros, leaf.shape, dtype), out_shardings=leaf.sharding)()
        for layer in range(source.config.layers):
            stack = _set_layer(stack, _place(source.read(name, layer)[None], leaf.sharding), layer)
        return stack

    return jax.tree_util.tree_map_with_path(load, abstract)


def _place(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@partial(jax.jit, donate_argnums=0)
def _set_layer(stack: jax.Array, block: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, block.astype(stack.dtype), layer, axis=0)
