"""PyTorch's file format: where each tensor of a file lies, and writing one tensor after the other.

Such a file is an uncompressed zip archive: `data.pkl` lists the tensors, and the numbers of each are a member of their own.
Reading goes through `torch.load(weights_only=True)`, which runs no code from the file, with fake tensors, which hold no numbers.
"""

import io
import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from etils.epath import Path

from llama2_jax.checkpoints.source import DTYPES, Stored
from llama2_jax.config import UserError, shown
from llama2_jax.files import Output, open_file, size_of

LIST_BYTES = 2**23  # of `data.pkl`, at most; a model of 80 layers has a hundredth of it
ALIGNMENT = 64  # bytes; PyTorch maps the numbers into memory from there


def import_torch() -> Any:
    """The module.

    Raises:
      UserError: PyTorch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise UserError('PyTorch is needed for .pth and .bin files: pip install torch; safetensors files do without.') from None
    return torch


def tensors_in(path: Path) -> dict[str, Stored]:
    """Name -> where it lies.

    Raises:
      UserError: the file is damaged, holds other things than tensors, or was written by PyTorch before 1.6.
    """
    torch = import_torch()
    from torch._subclasses.fake_tensor import FakeTensorMode

    with open_file(path) as file:
        _check_archive(path, file)
        file.seek(0)
        try:
            with warnings.catch_warnings(), FakeTensorMode():
                warnings.simplefilter('ignore')
                content = torch.load(file, map_location='cpu', weights_only=True)
        except Exception as error:
            if forbidden := re.search(r'GLOBAL ([\w.]+)', str(error)):
                raise UserError(f'{path} holds {forbidden[1]}, which is code and not a tensor: it is not read.') from None
            reason = str(error).strip().partition('\n')[0]
            raise UserError(f'{path} is damaged, or holds more than tensors, which is not read ({shown(reason, 160)}).') from None
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise UserError(f'{path} holds no names with tensors, but a {type(content).__name__}.')
    return {name: _stored(path, name, tensor, torch) for name, tensor in content.items()}


def _check_archive(path: Path, file: BinaryIO) -> None:
    """Raises a UserError unless it is a zip archive as torch.save writes it: nothing compressed, which could be of any size."""
    size = file.seek(0, os.SEEK_END)
    try:
        members = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, struct.error):
        raise UserError(f'{path} is damaged, or was written by PyTorch before 1.6: it is not a zip archive.') from None
    left = size
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise UserError(f'{path} is compressed, which PyTorch does not do: {shown(member.filename)} in it is not read.')
        if member.filename.rpartition('/')[2] == 'data.pkl' and member.file_size > LIST_BYTES:
            raise UserError(f'{path}: the list of its tensors has {member.file_size} bytes, more than {LIST_BYTES}.')
        left -= member.file_size
    if left < 0:
        raise UserError(f'{path} is damaged: its members overlap, or are longer than the file.')


def _stored(path: Path, name: str, tensor: Any, torch: Any) -> Stored:
    dtype = DTYPES.get(str(getattr(tensor, 'dtype', '')).removeprefix('torch.'))
    if not isinstance(tensor, torch.Tensor) or dtype is None:
        raise UserError(f'{path}: {shown(name)} is not a tensor of float32, bfloat16 or float16.')
    begin = tensor.untyped_storage()._checkpoint_offset
    if begin is None:
        raise UserError(f'{path}: {shown(name)} has no numbers in the file.')
    strides = None if tensor.is_contiguous() else tensor.stride()
    found = Stored(path, begin + tensor.storage_offset() * dtype.itemsize, tuple(tensor.shape), dtype, strides)
    if found.offset + found.span > size_of(path):
        raise UserError(f'{path} is cut short: tensor {shown(name)} is missing or incomplete.')
    return found


class TorchFile:
    """Writes a file that `torch.load` reads as a dict of tensors. They are given one by one, in the order of `shapes`.

    By hand, since `zipfile` goes back to each member to fill in its checksum, which no bucket allows.
    """

    def __init__(self, file: Output, stem: str, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype):
        self._file, self._stem, self._count = file, stem, 0
        self._place, self._index = 0, []
        self._small('data.pkl', _pickled(shapes, dtype))
        self._small('byteorder', b'little')

    def write(self, content: np.ndarray, checksum: int) -> None:
        """The next tensor: its bytes, and their CRC-32."""
        self._member(f'data/{self._count}', content, checksum)
        self._count += 1

    def finish(self) -> None:
        """Completes the file: the end of an archive with long sizes (APPNOTE.TXT 4.3.14 to 4.3.16)."""
        self._small('version', b'3\n')
        index = b''.join(self._index)
        count, end = len(self._index), self._place + len(index)
        self._append(index)
        self._append(struct.pack('<4sQHHLLQQQQ', b'PK\6\6', 44, 45, 45, 0, 0, count, count, len(index), end - len(index)))
        self._append(struct.pack('<4sLQL', b'PK\6\7', 0, end, 1))
        self._append(struct.pack('<4sHHHHLLH', b'PK\5\6', 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0))

    def _small(self, name: str, content: bytes) -> None:
        self._member(name, content, zlib.crc32(content))

    def _member(self, name: str, content: Any, checksum: int) -> None:
        name, size, long, date = f'{self._stem}/{name}'.encode(), len(content), 0xFFFFFFFF, 0x21  # 1980-01-01
        # A local header: 30 bytes, the name, 20 for long sizes, and a field that fills up to the alignment.
        padding = -(self._place + 30 + len(name) + 20 + 4) % ALIGNMENT
        common = struct.pack('<HHHHHLLLH', 45, 0, 0, 0, date, checksum, long, long, len(name))
        sizes = struct.pack('<HHQQ', 1, 16, size, size)
        filling = struct.pack('<HH', 0x4246, padding) + bytes(padding)
        place = self._place
        self._append(b'PK\3\4' + common + struct.pack('<H', len(sizes + filling)) + name + sizes + filling)
        self._append(content)
        extra = struct.pack('<HHQQQ', 1, 24, size, size, place)
        tail = struct.pack('<HHHHLL', len(extra), 0, 0, 0, 0, long)
        self._index.append(b'PK\1\2' + struct.pack('<H', 45) + common + tail + name + extra)

    def _append(self, content: Any) -> None:
        self._file.write(content)
        self._place += len(content)


def _pickled(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype) -> bytes:
    """`data.pkl`: what torch.save would write for these tensors, each with a storage of its own."""
    torch = import_torch()
    storage_type = {'float32': torch.FloatStorage, 'bfloat16': torch.BFloat16Storage, 'float16': torch.HalfStorage}[dtype.name]

    class Storage:
        def __init__(self, number: int, size: int):
            self.number, self.size = number, size

    class Tensor:
        def __init__(self, number: int, shape: tuple[int, ...]):
            self.storage, self.shape = Storage(number, int(np.prod(shape))), shape

        def __reduce__(self) -> tuple:
            strides = tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))
            return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: Any) -> tuple | None:
            if isinstance(thing, Storage):
                return 'storage', storage_type, str(thing.number), 'cpu', thing.size
            return None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({name: Tensor(i, shape) for i, (name, shape) in enumerate(shapes.items())})
    return buffer.getvalue()
