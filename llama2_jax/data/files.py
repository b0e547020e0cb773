"""Rows of files, told apart by content: JSON lines, a JSON array, Parquet, Arrow, CSV; plain, gzip or zstd.

Everything streams but a JSON array. A file whose name promises another format than its content has is refused by name.
"""

import contextlib
import csv
import gzip
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from llama2_jax.config import UserError, reason

HEAD = 1024  # bytes that tell formats apart
MAGIC = {
    b'\x1f\x8b': 'gzip', b'\x28\xb5\x2f\xfd': 'zstd', b'PAR1': 'parquet', b'ARROW1': 'arrow', b'\xff\xff\xff\xff': 'arrow',
    b'PK\x03\x04': 'zip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x80\x04': 'pickle', b'%PDF': 'PDF', b'\x7fELF': 'a program',
    b'SQLite format 3': 'SQLite', b'\xff\xfe': 'UTF-16 text', b'\xfe\xff': 'UTF-16 text',
}  # fmt: skip
SUFFIXES = {
    '.gz': 'gzip', '.zst': 'zstd', '.zstd': 'zstd', '.parquet': 'parquet', '.arrow': 'arrow', '.jsonl': 'JSON', '.json': 'JSON',
    '.ndjson': 'JSON', '.csv': 'csv', '.tsv': 'csv', '.txt': 'text',
}  # fmt: skip
PACKED = ('gzip', 'zstd')
# A file of which a few bytes become gigabytes is made to fill the memory. Text shrinks to a tenth, seldom to a hundredth.
MAX_GROWTH, FREE_GROWTH = 200, 2**26
BATCH = 64  # rows of a table that are objects at once: each may hold the same long text of a dictionary
BOM = b'\xef\xbb\xbf'

Position = tuple[int, int]  # a place in a file: bytes and lines before it
BEGIN: Position = (0, 0)


def is_rows(name: str) -> bool:
    """Whether a file is one of rows, by its name."""
    return _promised(name) not in (None, 'text')


def open_file(path: str) -> BinaryIO:
    """Opens a file, decompressed if its content is gzip or zstd, without a byte order mark.

    Raises:
      UserError: the name promises another format than the content has, or while reading: the file is damaged.
    """
    raw = open_raw(path)
    found, promised = looks_like(raw.peek(HEAD)[:HEAD]), SUFFIXES.get(PurePath(path).suffix.lower())
    if promised in PACKED and raw.peek(1) and found != promised:
        raw.close()
        raise UserError(f'{path} is a corrupt or half-written {promised} file: it looks like {found}.')
    if promised and promised not in PACKED and found in PACKED:
        raw.close()
        raise UserError(f'{path} looks like {found}; rename it to end in .{ {"gzip": "gz", "zstd": "zst"}[found] }.')
    file = io.BufferedReader(_Unpacked(path, raw, found), 2**18) if found in PACKED else raw
    if file.peek(3)[:3] == BOM:
        file.read(3)
    return file


@contextlib.contextmanager
def read_errors(path: str) -> Iterator[None]:
    """Turns what the system says against opening or reading a file into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f'{path} cannot be read: {error.strerror or reason(error)}.') from None


def open_raw(path: str) -> io.BufferedReader:
    """The bytes of a file as they lie."""
    if '://' in path:
        from etils import epath

        file = epath.Path(path).open('rb')
        return file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)
    return open(path, 'rb')


def looks_like(head: bytes) -> str:
    """The format of a file by its first bytes; 'JSON', 'csv' or 'text' where it is text, 'binary data' where it is unknown."""
    for magic, name in MAGIC.items():
        if head.startswith(magic):
            return name
    if head[257:262] == b'ustar':
        return 'tar'
    if b'\0' in head:
        return 'binary data'
    line = head.removeprefix(BOM).lstrip().split(b'\n')[0]
    if line[:1] in (b'{', b'['):
        return 'JSON'
    return 'csv' if re.fullmatch(rb'["\w .-]+([,\t]["\w .-]+)+\r?', line) else 'text'


def check_text(path: str, head: bytes) -> None:
    """Raises a UserError if a file of text is something else."""
    if (found := looks_like(head)) not in ('JSON', 'csv', 'text'):
        raise UserError(f'{path} is no text, it looks like {found}; {_ADVICE.get(found, "remove it or convert it to text")}.')


_ADVICE = {'parquet': 'read it as rows:', 'arrow': 'read it as rows:', 'tar': 'unpack it', 'zip': 'unpack it'}


class _Unpacked(io.RawIOBase):
    """The decompressed bytes of a file, with errors that name it."""

    def __init__(self, path: str, raw: BinaryIO, format: str):
        self._path, self._raw, self._format, self._size = path, raw, format, 0
        self._file = gzip.GzipFile(fileobj=raw) if format == 'gzip' else pa.CompressedInputStream(pa.PythonFile(raw), 'zstd')

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._raw.close()
        super().close()

    def readinto(self, buffer) -> int:
        try:
            data = self._file.read(len(buffer))
        except (EOFError, MemoryError, OSError, zlib.error, pa.ArrowException) as error:
            raise UserError(f'{self._path} is a corrupt or half-written {self._format} file: {reason(error)}.') from error
        self._size += len(data)
        check_growth(self._path, self._size, self._raw.tell())
        buffer[: len(data)] = data
        return len(data)


def check_growth(path: str, size: int, packed: int) -> None:
    """Raises a UserError for a file of which `packed` bytes become so many more that it can only be meant to do harm."""
    if size > max(FREE_GROWTH, MAX_GROWTH * packed):
        raise UserError(f'{path} holds {size} bytes or more in {packed}: unpack it, and look at what it is, if it is to be read.')


def read_rows(path: str, start: Position = BEGIN) -> Iterator[tuple[str, Any, Position | None]]:
    """The rows of a file: places such as 'a.jsonl:17', and objects, or where they are JSON lines, their bytes.

    With each comes the position after it, if a file that has grown may be read from there on; otherwise None.

    Args:
      start: such a position.

    Raises:
      UserError: a format that holds no rows, another one than the name promises, or a damaged file.
    """
    with read_errors(path), open_file(path) as file:
        head = file.peek(HEAD)[:HEAD]
        found, promised = looks_like(head), _promised(path)
        if found == 'text' and promised in ('JSON', 'csv'):  # the rows will say what is wrong
            found = promised
        if not head.strip():
            return
        if promised and found != promised:
            raise UserError(f'{path} looks like {found}, not like {promised} as its name says: rename it.')
        if found not in ('JSON', *_READERS):
            raise UserError(f'{path} looks like {found}; rows are read from JSON, Parquet, Arrow and CSV.')
        if found == 'JSON':
            yield from _json(path, file, start)
        else:
            for where, row in _READERS[found](path, file):
                yield where, row, None


def _promised(path: str) -> str | None:
    suffixes = [SUFFIXES.get(suffix.lower()) for suffix in PurePath(path).suffixes]
    inner = [name for name in suffixes if name not in PACKED] if suffixes and suffixes[-1] in PACKED else suffixes
    return inner[-1] if inner else None


def _json(path: str, file: BinaryIO, start: Position) -> Iterator[tuple[str, Any, Position | None]]:
    seekable = file.seekable()  # neither gzip nor zstd
    if start != BEGIN:
        file.seek(start[0])
    offset, number = file.tell() if seekable else 0, start[1]
    first = start == BEGIN
    for line in file:
        offset, number = offset + len(line), number + 1
        if line.isspace():
            continue
        if first and line.lstrip().startswith(b'['):
            for i, row in enumerate(parse(line + file.read(), path)):
                yield f'{path} element {i}', row, None
            return
        first = False
        yield f'{path}:{number}', line, (offset, number) if seekable and line.endswith(b'\n') else None


def parse(data: bytes, where: str) -> Any:
    """JSON, or a UserError that names the place."""
    try:
        value = json.loads(data.decode())
        if b'\\ud' in data.lower():  # JSON can spell half a surrogate pair, which is no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{where} holds a lone surrogate (U+{ord(error.object[error.start]):04X}), which is not text.') from None
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON: {reason(error)}.') from error
    return value


def _csv(path: str, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    try:
        with io.TextIOWrapper(file, 'utf-8', newline='') as text:
            header = text.readline()
            mark = '\t' if '\t' in header and ',' not in header else ','
            names = next(csv.reader([header], delimiter=mark))
            reader = csv.reader(text, delimiter=mark, strict=True)
            for row in reader:
                if row:
                    yield f'{path}:{reader.line_num + 1}', dict(zip(names, row, strict=True)) if len(row) == len(names) else row
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f'{path} is no CSV file in UTF-8: {reason(error)}.') from error


def _parquet(path: str, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    def batches() -> Iterator[pa.RecordBatch]:
        table = pa.parquet.ParquetFile(file)
        groups = map(table.metadata.row_group, range(table.num_row_groups))
        check_growth(path, sum(group.total_byte_size for group in groups), file.seek(0, io.SEEK_END))
        return table.iter_batches(BATCH)

    yield from _batches(path, batches)


def _arrow(path: str, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    def batches() -> Iterator[pa.RecordBatch]:
        start = 8 if file.peek(6)[:6] == b'ARROW1' else 0  # a file is a stream after its magic; its footer is not needed
        file.seek(start)
        size = sum(map(_unpacked_size, pa.ipc.MessageReader.open_stream(file)))
        check_growth(path, size, file.seek(0, io.SEEK_END))
        file.seek(start)
        return iter(pa.ipc.open_stream(file))

    yield from _batches(path, batches)


def _unpacked_size(message: pa.ipc.Message) -> int:
    """Bytes that the buffers of an Arrow message have once they are decompressed, as they say themselves.

    pyarrow decompresses a whole message and has no limit for that, so this reads the FlatBuffers of Arrow's `Message.fbs`.

    Raises:
      OSError: the message is damaged.
    """
    data, body = memoryview(message.metadata), memoryview(message.body or b'')

    def field(table: int, number: int) -> int:
        """Where a field of a table lies, 0 if it is absent."""
        layout = table - struct.unpack_from('<i', data, table)[0]
        slot = 4 + 2 * number
        offset = struct.unpack_from('<H', data, layout + slot)[0] if slot < struct.unpack_from('<H', data, layout)[0] else 0
        return offset and table + offset

    def follow(at: int) -> int:
        return at + struct.unpack_from('<I', data, at)[0]

    try:
        if message.type not in ('record batch', 'dictionary'):
            return 0
        batch = follow(field(follow(0), 2))  # Message.header
        if message.type == 'dictionary':
            batch = follow(field(batch, 1))  # DictionaryBatch.data
        if not field(batch, 3):  # RecordBatch.compression
            return len(body)
        vector = follow(field(batch, 2))  # RecordBatch.buffers
        places = struct.iter_unpack('<2q', data[vector + 4 : vector + 4 + 16 * struct.unpack_from('<I', data, vector)[0]])
        sizes = [struct.unpack_from('<q', body, offset)[0] if length else 0 for offset, length in places]
        return sum(size for size in sizes if size > 0)  # -1: as it lies
    except struct.error as error:
        raise OSError(f'damaged message: {error}') from None


def _batches(path: str, open) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for batch in open():
            batch.validate(full=True)  # offsets outside of the buffers crash the process otherwise
            for start in range(0, len(batch), BATCH):
                for row in batch.slice(start, BATCH).to_pylist():
                    yield f'{path} row {number}', row
                    number += 1
    except (pa.ArrowException, MemoryError, OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} is corrupt or half-written at row {number}: {reason(error)}.') from error


_READERS = {'csv': _csv, 'parquet': _parquet, 'arrow': _arrow}
