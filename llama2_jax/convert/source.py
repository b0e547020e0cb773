"""A model opened for reading in any format, tensor by tensor, and what its readers share."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils.epath import Path

from llama2_jax.config import ModelConfig, UserError, nearest
from llama2_jax.convert.names import Key, their_shape
from llama2_jax.files import read_bytes, write

DTYPES = {
    'float32': np.dtype(np.float32),
    'bfloat16': np.dtype(ml_dtypes.bfloat16),
    'float16': np.dtype(np.float16),
}


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
    """

    path: Path
    form: str
    config: ModelConfig
    dtype: np.dtype
    head: str
    read: Callable[[str, int | None], np.ndarray]
    tokenizer: Callable[[], bytes]
    provenance: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file: where its numbers lie. Files are read and not mapped: mapped pages would count as memory."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None  # in elements; None: C order

    def read(self) -> np.ndarray:
        """The tensor.

        Raises:
          UserError: the file is shorter than it should be.
        """
        span = int(np.prod(self.shape))
        if self.strides is not None:
            span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        flat = read_bytes(self.path, self.offset, span * self.dtype.itemsize).view(self.dtype)
        if self.strides is None:
            return flat.reshape(self.shape)
        return np.lib.stride_tricks.as_strided(flat, self.shape, [stride * self.dtype.itemsize for stride in self.strides])


def check_tensors(found: Mapping[str, Stored], wanted: Mapping[str, Key], config: ModelConfig, shards: int, where: Path) -> None:
    """Compares what a file or directory holds with what the model needs.

    Raises:
      UserError: naming the first tensor that is missing, unknown or of another shape or kind, and its file.
    """
    for name, stored in found.items():
        if name not in wanted:
            raise UserError(f'{stored.path}: tensor {name!r} is unknown; {nearest_name(name, wanted)}')
    for name, (ours, _) in wanted.items():
        if name not in found:
            raise UserError(f'{where}: tensor {name!r} is missing; {nearest_name(name, found)}')
        if found[name].shape != (shape := their_shape(ours, config, shards)):
            raise UserError(f'{found[name].path}: tensor {name!r} has the shape {list(found[name].shape)}, not {list(shape)}.')


def nearest_name(name: str, choices: Iterable[str]) -> str:
    """`nearest`, without listing all the names of a model."""
    text = nearest(name, choices)
    return text if text.startswith('did') else 'nothing there has a similar name.'


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The dtype that all have, or float32, which holds every number of the others."""
    dtypes = set(dtypes)
    return dtypes.pop() if len(dtypes) == 1 else DTYPES['float32']


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: there is none.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or error}.') from None
    except ValueError:
        raise UserError(f'{path} is damaged: it is not JSON.') from None
    if not isinstance(content, dict):
        raise UserError(f'{path} is damaged: it is not a JSON object.')
    return content


def tokenizer_beside(path: Path) -> bytes:
    """The content of the tokenizer.model in a directory.

    Raises:
      UserError: there is none.
    """
    file = path / 'tokenizer.model'
    if not file.is_file():
        raise UserError(f'{path} has no tokenizer.model (SentencePiece); it belongs beside the weights.')
    return file.read_bytes()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON object."""
    write(path, (json.dumps(content, indent=2, ensure_ascii=False) + '\n').encode())
