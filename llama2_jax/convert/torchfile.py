"""PyTorch's file format: where each tensor of a file lies, and writing one tensor after the other.

Such a file is an uncompressed zip archive: `data.pkl` lists the tensors, and the numbers of each are a member of their own.
Reading goes through `torch.load(weights_only=True)`, which runs no code from the file, with fake tensors, which hold no numbers.
"""

import contextlib
import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llama2_jax.config import UserError
from llama2_jax.convert.source import DTYPES, Stored

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

    if not zipfile.is_zipfile(path):
        raise UserError(f'{path} is damaged, or was written by PyTorch before 1.6: it is not a zip archive.')
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        reason = str(error).strip().partition('\n')[0]
        raise UserError(f'{path} is damaged, or holds more than tensors, which is not read ({reason[:160]}).') from None
    return {name: _stored(path, name, tensor, torch) for name, tensor in _items(path, content)}


def _items(path: Path, content: Any) -> Any:
    if not isinstance(content, Mapping):
        raise UserError(f'{path} holds no names with tensors, but a {type(content).__name__}.')
    return content.items()


def _stored(path: Path, name: str, tensor: Any, torch: Any) -> Stored:
    dtype = DTYPES.get(str(getattr(tensor, 'dtype', '')).removeprefix('torch.'))
    if not isinstance(tensor, torch.Tensor) or dtype is None:
        raise UserError(f'{path}: {name!r} is not a tensor of float32, bfloat16 or float16.')
    offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * dtype.itemsize
    return Stored(path, offset, tuple(tensor.shape), dtype, None if tensor.is_contiguous() else tensor.stride())


class TorchFile:
    """Writes a file that `torch.load` reads as a dict of tensors. They are given one by one, in the order of `shapes`."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype):
        self._file = path.open('wb')
        self._zip = zipfile.ZipFile(self._file, 'w', zipfile.ZIP_STORED)
        self._stem, self._count = path.stem, 0
        self._member('data.pkl', _pickled(shapes, dtype))
        self._member('byteorder', b'little')

    def write(self, array: np.ndarray) -> None:
        """The next tensor, C-contiguous."""
        self._member(f'data/{self._count}', array.reshape(-1).view(np.uint8))
        self._count += 1

    def __enter__(self) -> 'TorchFile':
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Completes the file, unless writing it has failed."""
        if kind is None:
            self._member('version', b'3\n')
            self._zip.close()
            self._file.close()
            return
        self._zip.fp = None  # or it would write its index when it is collected
        with contextlib.suppress(OSError):
            self._file.close()

    def _member(self, name: str, content: Any) -> None:
        info = zipfile.ZipInfo(f'{self._stem}/{name}')
        # A local header: 30 bytes, the name, 20 for long sizes, and this field, which fills up to the alignment.
        start = self._file.tell() + 30 + len(info.filename) + 20 + 4
        padding = -start % ALIGNMENT
        info.extra = struct.pack('<HH', 0x4246, padding) + bytes(padding)
        with self._zip.open(info, 'w', force_zip64=True) as member:
            member.write(memoryview(content))


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
