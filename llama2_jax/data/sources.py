"""What source strings name: `toy:NAME`, `text:GLOB`, `jsonl:GLOB`, `arrayrecord:GLOB`, `tfds:NAME[/CONFIG][:VERSION][#split]`.

`read_documents` gives the texts to pretrain on, `read_records` whole rows. Everything streams: no file is ever held in memory,
but for one that is a single JSON array of records. Files ending in `.gz` are decompressed on the way, and `gs://` globs work
where `etils.epath` can read them (`pip install gcsfs`), except `arrayrecord:`, which needs a mounted bucket.
"""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from llama2_jax.config import UserError, nearest

SEPARATOR = b'<|endoftext|>'  # a line of its own between two documents of a text file
PIECE = 16 * 1024  # bytes; a longer text document is cut into pieces of at most this
PART = 64 * 2**20  # bytes; small files are read together until a part has this much
PARTS = 1024  # larger sources get larger parts, so that a token cache never has many more files than this
EXAMPLES = 16_384  # of a TFDS data set in one part, at least


class Record(NamedTuple):
    """A row with named fields, its file (or data set), and its place for errors: 'a.jsonl:17'."""

    file: str
    where: str
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """An independent share of a source; the parts of a source in order hold its documents in order.

    Attributes:
      kind: toy, text, jsonl, arrayrecord or tfds.
      names: files, or one toy genre or kind of records, or one TFDS data set with its split.
      stamp: changes when the content may have: sizes and times of the files, versions.
      bytes: size of the files as they lie, 0 if unknown; None where reading needs more bytes than the files have (gz).
      start, stop: range of examples (tfds only).
    """

    kind: str
    names: tuple[str, ...]
    stamp: str
    bytes: int | None = 0
    start: int = 0
    stop: int = 0

    def documents(self) -> Iterator[str]:
        """The documents, streamed; empty ones too."""
        if self.kind == 'toy':
            from llama2_jax.data import toy

            if self.names[0] in toy.RECORDS:
                raise UserError(f'Source toy:{self.names[0]} holds records, not documents.')
            yield from toy.documents(self.names[0])
        elif self.kind == 'tfds':
            yield from _read_tfds(self.names[0], self.start, self.stop)
        else:
            for name in self.names:
                yield from _READERS[self.kind](name)

    def records(self) -> Iterator[Record]:
        """The rows, streamed.

        Raises:
          UserError: the source holds plain text, or a row is not an object.
        """
        name = self.names[0]
        if self.kind == 'toy':
            from llama2_jax.data import toy

            if name not in toy.RECORDS:
                raise UserError(f'Source toy:{name} holds documents, not records; {nearest(name, toy.RECORDS)}')
            for i, fields in enumerate(toy.RECORDS[name]()):
                yield Record(f'toy:{name}', f'toy:{name} record {i}', fields)
        elif self.kind == 'tfds':
            for where, example in _tfds_rows(name, self.start, self.stop):
                try:
                    yield _record(name, where, _plain(example))
                except UnicodeDecodeError as error:
                    raise UserError(f'{where} is not valid UTF-8 at byte {error.start}.') from error
        elif self.kind == 'text':
            raise UserError(f'Source text:{name} is plain text; records are read from jsonl:, arrayrecord:, tfds: and toy:.')
        else:
            for name in self.names:
                for where, data in _ROWS[self.kind](name):
                    yield _record(name, where, _parse(data, where) if isinstance(data, bytes) else data)


def read_records(source: str) -> Iterator[Record]:
    """All rows of a source string, in order.

    Raises:
      UserError: unknown kind, nothing there, plain text, or a corrupt file, naming file and line or record.
    """
    for part in split(source):
        yield from part.records()


def read_documents(source: str) -> Iterator[str]:
    """All documents of a source string, in order.

    Raises:
      UserError: unknown kind, nothing there, or a corrupt file, naming file and line, byte or record.
    """
    for part in split(source):
        yield from part.documents()


def split(source: str) -> list[Part]:
    """Divides a source into parts that can be read independently; depends on the source alone, not on who reads it.

    Raises:
      UserError: unknown kind or genre, or nothing there.
    """
    kind, colon, name = source.partition(':')
    if kind not in _SPLITTERS:
        raise UserError(f'Source {source!r} is of an unknown kind {kind!r}; {nearest(kind, _SPLITTERS)}')
    if not colon or not name:
        raise UserError(f'Source {source!r} names nothing after {kind!r}; write {_FORMS[kind]}.')
    try:
        return _SPLITTERS[kind](kind, name)
    except (ImportError, OSError) as error:  # such as gs:// without gcsfs, or without permission
        raise UserError(f'Source {source} cannot be read: {error}.') from error


# Splitting


def _split_files(kind: str, pattern: str) -> list[Part]:
    files = list(_glob(pattern))
    if not files:
        raise UserError(f'Source {kind}:{pattern} matches no file.')
    target = max(PART, sum(size for _, size, _ in files) // PARTS)
    parts, group, total = [], [], 0
    for file in files:
        group.append(file)
        total += file[1]
        if total >= target or file is files[-1]:
            names, sizes, times = zip(*group, strict=True)
            zipped = any(name.endswith('.gz') for name in names)
            parts.append(Part(kind, names, f'{sizes}{times}', None if zipped else total))
            group, total = [], 0
    return parts


def _split_toy(kind: str, name: str) -> list[Part]:
    from llama2_jax.data import toy

    if name != 'documents' and name not in toy.GENRES and name not in toy.RECORDS:
        raise UserError(f'Source {kind}:{name}: {nearest(name, ("documents", *toy.GENRES, *toy.RECORDS))}')
    code = b''.join(
        path.read_bytes() for path in sorted(Path(toy.__file__).parent.glob('*.py'))
    )  # generated: its code is its content
    stamp = hashlib.sha256(code).hexdigest()
    return [Part(kind, (genre,), stamp) for genre in (toy.GENRES if name == 'documents' else (name,))]


def _split_tfds(kind: str, name: str) -> list[Part]:
    examples = _tfds_examples(name)
    total = len(examples)
    size = max(EXAMPLES, -(-total // PARTS))
    stamp = f'{examples.dataset_info.full_name} {total}'
    return [Part(kind, (name,), stamp, 0, start, min(start + size, total)) for start in range(0, total, size)]


_SPLITTERS: dict[str, Callable[[str, str], list[Part]]] = {
    'toy': _split_toy,
    'text': _split_files,
    'jsonl': _split_files,
    'arrayrecord': _split_files,
    'tfds': _split_tfds,
}
_FORMS = {
    'toy': 'toy:documents or toy:<genre>',
    'text': 'text:GLOB',
    'jsonl': 'jsonl:GLOB',
    'arrayrecord': 'arrayrecord:GLOB',
    'tfds': 'tfds:NAME[/CONFIG][:VERSION][#split]',
}


def _glob(pattern: str) -> Iterator[tuple[str, int, int]]:
    """Path, size and modification time of the files that match, sorted by path."""
    if '://' in pattern:
        from etils import epath

        parent = re.match(r'[^*?\[]*/', pattern).group()
        paths = sorted(path for path in epath.Path(parent).glob(pattern[len(parent) :]) if path.is_file())
        for path in paths:
            yield str(path), path.stat().length, int(path.stat().mtime)
    else:
        for path in map(Path, sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))):
            if path.is_file():
                yield str(path), path.stat().st_size, path.stat().st_mtime_ns


# Reading


def _open(path: str) -> BinaryIO:
    if '://' in path:
        from etils import epath

        raw = epath.Path(path).open('rb')
    else:
        raw = open(path, 'rb')  # noqa: SIM115 the caller closes it
    return io.BufferedReader(_Gzip(path, raw), 2**18) if path.endswith('.gz') else raw


class _Gzip(gzip.GzipFile):
    """A GzipFile whose errors name the file."""

    def __init__(self, path: str, raw: BinaryIO):
        super().__init__(fileobj=raw, mode='rb')
        self._where, self._raw = path, raw

    def close(self) -> None:
        super().close()
        self._raw.close()

    def readinto(self, buffer) -> int:
        try:
            return super().readinto(buffer)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f'{self._where} is a corrupt or half-written gzip file: {error}.') from error


def _read_text(path: str) -> Iterator[str]:
    """Documents of a text file: parted by lines that are `<|endoftext|>`, long ones cut by `_cut`; nothing else is dropped."""
    buffer, offset, line_start = bytearray(), 0, True

    def decode(end: int) -> str:
        nonlocal offset
        piece = bytes(buffer[:end])
        del buffer[:end]
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            raise UserError(f'{path} is not valid UTF-8 at byte {offset + error.start}.') from error
        offset += len(piece)
        return text

    with _open(path) as file:
        while line := file.readline(PIECE):
            if line_start and line.rstrip(b'\r\n') == SEPARATOR:
                yield decode(len(buffer))
                offset += len(line)
                continue
            buffer += line
            line_start = line.endswith(b'\n')
            while len(buffer) > PIECE:
                yield decode(_cut(buffer))
    if buffer:
        yield decode(len(buffer))


def _cut(buffer: bytearray) -> int:
    """Where to cut: after the last blank line within PIECE bytes, else after the last newline, else space, else character."""
    for mark in (b'\n\n', b'\n', b' '):
        at = buffer.rfind(mark, 0, PIECE)
        if at >= 0:
            return at + len(mark)
    end = PIECE
    while end > PIECE - 4 and buffer[end] & 0xC0 == 0x80:  # the second to fourth byte of a character
        end -= 1
    return end


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    """The lines of a file, with their places."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield f'{path}:{number}', line


def _rows(path: str) -> Iterator[tuple[str, Any]]:
    """The lines of a jsonl file, or the elements of one that is a single JSON array, as some data sets are published."""
    with _open(path) as file:
        array = file.readline().lstrip().startswith(b'[')
    if not array:
        yield from _lines(path)
        return
    with _open(path) as file:
        rows = _parse(file.read(), path)
    for number, row in enumerate(rows):
        yield f'{path} element {number}', row


def _array_records(path: str) -> Iterator[tuple[str, bytes]]:
    """Records are JSON objects like the lines of a jsonl file."""
    from array_record.python.array_record_module import ArrayRecordReader

    number = 0
    try:
        reader = ArrayRecordReader(path)
        for number in range(reader.num_records()):
            yield f'{path} record {number}', reader.read()
        reader.close()  # raises for a cut file, which claims to have no records
    except (RuntimeError, ValueError, IndexError, SystemError) as error:
        raise UserError(f'{path} record {number} cannot be read, the file is corrupt or half-written: {error}.') from error


def _text_field(data: bytes, where: str) -> str:
    try:
        text = json.loads(data.decode())['text']
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except KeyError:
        raise UserError(f"{where} has no field 'text'.") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is not a JSON object with a string 'text': {error}.") from error
    return text


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode())
    except ValueError as error:
        raise UserError(f'{where} is not JSON: {error}.') from error


def _record(file: str, where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(f'{where} is not an object with named fields.')
    return Record(file, where, value)


def _texts(rows: Callable[[str], Iterator[tuple[str, bytes]]], path: str) -> Iterator[str]:
    for where, data in rows(path):
        yield _text_field(data, where)


_READERS = {'text': _read_text, 'jsonl': partial(_texts, _lines), 'arrayrecord': partial(_texts, _array_records)}
_ROWS = {'jsonl': _rows, 'arrayrecord': _array_records}


def _tfds_examples(name: str):
    """Random access to a TFDS data set without TensorFlow; downloads and prepares it (as array_record) when absent."""
    import tensorflow_datasets as tfds

    dataset, _, split = name.partition('#')
    try:
        return tfds.data_source(dataset, split=split or 'train')
    except Exception as error:  # TFDS raises whatever its builders raise
        raise UserError(
            f'Source tfds:{name} cannot be opened: {str(error).splitlines()[0] if str(error) else error!r}'
        ) from error


def _tfds_rows(name: str, start: int, stop: int) -> Iterator[tuple[str, Any]]:
    examples = _tfds_examples(name)
    for index in range(start, stop):
        yield f'Source tfds:{name} example {index}', examples[index]


def _plain(value: Any) -> Any:
    """What TFDS gives, as JSON would give it: bytes are text, arrays are lists."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if hasattr(value, 'tolist'):  # numpy
        return _plain(value.tolist())
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _read_tfds(name: str, start: int, stop: int) -> Iterator[str]:
    for where, example in _tfds_rows(name, start, stop):
        text = example.get('text') if isinstance(example, dict) else None
        if not isinstance(text, str | bytes):
            fields = ', '.join(example) if isinstance(example, dict) else type(example).__name__
            raise UserError(f"{where} has no field 'text' (it has: {fields}).")
        try:
            yield text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            raise UserError(f'{where} is not valid UTF-8 at byte {error.start}.') from error
