"""A model opened for reading in any format, tensor by tensor, and what its readers share."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils.epath import Path

from llama2_jax.checkpoints.formats.pieces import AddedToken
from llama2_jax.checkpoints.names import Key, their_shape
from llama2_jax.config import ModelConfig, UserError, nearest, shown
from llama2_jax.files import read_bytes, read_whole, write
from llama2_jax.text.template import PromptFormat
from llama2_jax.text.tokenizer import MODEL_BYTES

DTYPES = {
    'float32': np.dtype(np.float32),
    'bfloat16': np.dtype(ml_dtypes.bfloat16),
    'float16': np.dtype(np.float16),
}
PEFT_PREFIX = 'base_model.model.'
MAX_STOP_IDS = 8  # `inference.decode` holds as many beside EOS and a request's own


# Given what files hold of a parameter, (name, array) -> calls that each make a part of it: those parts of the parameters, in the
# order of `names.keys`, made by other threads while the last ones are being written.
Stream = Callable[[Callable[[str, np.ndarray], Iterable[Callable[[], Any]]]], Iterator[tuple[Key, Iterator[Any]]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of which nothing but shapes is in memory.

    Attributes:
      path: the directory or file.
      form: 'orbax', 'hf', 'meta' or 'gguf'.
      dtype: of the parameters; where they differ, the one that holds all of them.
      head: 'head_DV', or 'score_D' of a reward model.
      read: (name, layer) -> that parameter with the axes of our name; perhaps a view, perhaps of a smaller dtype.
      tokenizer: makes the content of tokenizer.model, or raises.
      provenance: stage, parent and step.
      stop_ids: token ids that end a text, where a file names them; (): the tokenizer's EOS.
      notes: sentences to print about what was read in another way than it is stored.
      prompts: how the model wants its prompts.
      added: the tokens that its files add to its tokenizer, by id.
      padded: rows that the vocabulary had before those without a piece were cut; 0: none were.
    """

    path: Path
    form: str
    config: ModelConfig
    dtype: np.dtype
    head: str
    read: Callable[[str, int | None], np.ndarray]
    tokenizer: Callable[[], bytes]
    provenance: Mapping[str, Any]
    stop_ids: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    prompts: PromptFormat = PromptFormat()
    added: Mapping[int, AddedToken] = dataclasses.field(default_factory=dict)
    padded: int = 0


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its numbers lie. Files are read and not mapped: mapped pages would count as memory."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None  # in elements; None: C order

    @property
    def span(self) -> int:
        """Bytes from its first number to its last."""
        if self.strides is None or not all(self.shape):
            return math.prod(self.shape) * self.dtype.itemsize
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return (1 + reach) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The tensor.

        Raises:
          UserError: the file is shorter than it should be.
        """
        flat = read_bytes(self.path, self.offset, self.span).view(self.dtype)
        if self.strides is None:
            return flat.reshape(self.shape)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [stride * self.dtype.itemsize for stride in self.strides])


def check_tensors(found: Mapping[str, Stored], wanted: Mapping[str, Key], config: ModelConfig, shards: int, where: Path) -> None:
    """Compares what a file or directory holds with what the model needs.

    Raises:
      UserError: naming the first tensor that is missing, unknown or of another shape or kind, and its file.
    """
    for name, stored in found.items():
        if name not in wanted and name.startswith(PEFT_PREFIX):
            raise UserError(
                f'{stored.path}: tensor {shown(name)} is of a model inside peft: save the model of merge_and_unload(), '
                'or the adapter alone, and merge that with convert --adapter=DIR.'
            )
        if name not in wanted:
            raise UserError(f'{stored.path}: tensor {shown(name)} is unknown; {nearest_name(name, wanted)}')
    for name, (ours, _) in wanted.items():
        if name not in found:
            raise UserError(f'{where}: tensor {name!r} is missing; {nearest_name(name, found)}')
        if found[name].shape != (shape := their_shape(ours, config, shards)):
            raise UserError(
                f'{found[name].path}: tensor {name!r} has the shape {shown(list(found[name].shape))}, not {list(shape)}.'
            )


def nearest_name(name: str, choices: Iterable[str]) -> str:
    """`nearest`, without listing all the names of a model."""
    text = nearest(name, choices)
    return text if text.startswith('did') else 'nothing there has a similar name.'


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that all have, or float32, which holds every number of the others."""
    dtypes = set(dtypes)
    return dtypes.pop() if len(dtypes) == 1 else DTYPES['float32']


def stored_dtype(path: Path, found: Iterable[Stored]) -> tuple[np.dtype, tuple[str, ...]]:
    """The dtype of a model's parameters by those of its tensors, and a note where some of them grow by it."""
    found = list(found)
    matrices = {stored.dtype for stored in found if len(stored.shape) > 1}
    dtype = matrix_dtype(matrices, (stored.read() for stored in found if stored.dtype not in matrices))
    smaller = sorted(kind.name for kind in matrices if kind.itemsize < dtype.itemsize)
    note = f'{path}: matrices of {" and ".join(smaller)} are read as {dtype.name}, since other tensors have digits that they'
    return dtype, (f'{note} cannot hold; --dtype={smaller[0]} rounds those instead.',) if smaller else ()


def matrix_dtype(matrices: Iterable[np.dtype], vectors: Iterable[np.ndarray]) -> np.dtype:
    """The dtype of a model's matrices if its vectors, often stored as float32, lose nothing in it; otherwise float32."""
    dtype = common_dtype(matrices)
    return dtype if all(np.array_equal(v.astype(dtype).astype(v.dtype), v) for v in vectors) else DTYPES['float32']


def tokenizer_beside(*directories: Path) -> bytes:
    """The content of the tokenizer.model in the first of these directories that has one.

    Raises:
      UserError: there is none.
    """
    for directory in directories:
        if (file := directory / 'tokenizer.model').exists():
            return read_whole(file, MODEL_BYTES)
    raise UserError(f'{directories[0]} has no tokenizer.model (SentencePiece): put the one of the model beside its weights.')


def check_stop_ids(label: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """The token ids that end a text, from a file: one, a list of them, or none.

    Raises:
      UserError: it is something else, or an id is outside of the vocabulary.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not -1 <= i < vocab_size for i in ids):
        raise UserError(f'{label} is {shown(value)}, which is not a list of token ids below {vocab_size}.')
    if len(ids) > MAX_STOP_IDS:
        raise UserError(f'{label} has {len(ids)} token ids, and {MAX_STOP_IDS} can end a text at most.')
    return tuple(dict.fromkeys(i for i in ids if i >= 0))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON object."""
    write(path, (json.dumps(content, indent=2, ensure_ascii=False) + '\n').encode())
