"""The beginning of a GGUF file: its fields and where its tensors lie.

The `gguf` library's own reader trusts every count in a file: an array of 2**62 items is a loop without an end. Here each count is
compared with the bytes that are left before anything is read.
"""

import math
import struct
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils.epath import Path

from llama2_jax.config import UserError, shown
from llama2_jax.files import open_file, size_of

MAGIC = b'GGUF'
HEADER_BYTES = 2**24  # shape, tokenizer and the list of tensors take no more
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8', 11: '<i8', 12: '<f8'}


class Tensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
      path: The file.
      shape: Rows first, as numpy has it; GGUF stores it the other way around.
      kind: The number of its type in the `gguf` library's GGMLQuantizationType.
      offset: Byte of the file where it begins.
    """

    path: Path
    shape: tuple[int, ...]
    kind: int
    offset: int


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields (numbers, text, lists) and tensors of a file.

    Raises:
      UserError: it is not a GGUF file, damaged, cut short or of a big-endian machine.
    """
    size = size_of(path)
    with open_file(path) as file:
        reader = _Reader(file, min(size, HEADER_BYTES))
        try:
            return _read(path, reader)
        except (_DamagedError, UnicodeDecodeError) as error:
            reason = 'a name or text in it is not UTF-8' if isinstance(error, UnicodeDecodeError) else error
            raise UserError(f'{path} is cut short, damaged, or not a GGUF file: {reason}.') from None


class _DamagedError(Exception):
    """What is wrong in a header."""


class _Reader:
    """Reads a file from its beginning, and no more of it than there is."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left, self._size = file, size, size

    @property
    def place(self) -> int:
        return self._size - self._left

    def take(self, count: int) -> bytes:
        if count > self._left:
            raise _DamagedError(f'{count} bytes are announced at byte {self.place}, and {self._left} are left for its header')
        self._left -= count
        if len(content := self._file.read(count)) != count:
            raise _DamagedError('its end is missing')
        return content

    def number(self, code: str) -> int:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        return self.take(self.number('<Q')).decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()
        if kind != ARRAY or depth > 2:
            raise _DamagedError(f'a field has the unknown type {kind}' if kind != ARRAY else 'its arrays are nested too deeply')
        item, count = self.number('<I'), self.number('<Q')
        if item in SCALARS:
            return np.frombuffer(self.take(count * np.dtype(SCALARS[item]).itemsize), SCALARS[item]).tolist()
        if count * 8 > self._left:  # a text or an array takes eight bytes at least
            raise _DamagedError(f'an array of {count} items is announced at byte {self.place}')
        return [self.value(item, depth + 1) for _ in range(count)]


def _read(path: Path, reader: _Reader) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if reader.take(4) != MAGIC:
        raise _DamagedError('it does not begin with GGUF')
    version = reader.number('<I')
    if version & 0xFFFF == 0:
        raise UserError(f'{path} is of a big-endian machine, which is not read: turn it around with gguf-convert-endian.')
    if version not in VERSIONS:
        raise UserError(f'{path} has version {version} of GGUF, and {VERSIONS} are read: convert it again with llama.cpp.')
    tensor_count, field_count = reader.number('<Q'), reader.number('<Q')
    fields: dict[str, Any] = {}
    for _ in range(field_count):  # ends with the bytes of the file at the latest
        name = reader.text()
        if name in fields:
            raise _DamagedError(f'field {shown(name)} is there twice')
        fields[name] = reader.value(reader.number('<I'))
    alignment = fields.get('general.alignment', 32)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise _DamagedError(f'general.alignment is {shown(alignment)}')
    entries = {}
    for _ in range(tensor_count):
        name, axes = reader.text(), reader.number('<I')
        if name in entries:
            raise _DamagedError(f'tensor {shown(name)} is there twice')
        if not 1 <= axes <= 4:
            raise _DamagedError(f'tensor {shown(name)} has {axes} axes')
        shape = tuple(reader.number('<Q') for _ in range(axes))[::-1]
        if not 0 < math.prod(shape) < 2**62:
            raise _DamagedError(f'tensor {shown(name)} has the shape {list(shape)}')
        entries[name] = shape, reader.number('<I'), reader.number('<Q')
    start = -(-reader.place // alignment) * alignment
    return fields, {name: Tensor(path, shape, kind, start + offset) for name, (shape, kind, offset) in entries.items()}
