"""Source strings to documents: `toy:NAME`, `text:GLOB`, `jsonl:GLOB`, `arrayrecord:GLOB`, `tfds:NAME[/CONFIG][:VERSION][#split]`.

Everything streams: no file is ever held in memory. Files ending in `.gz` are decompressed on the way, and `gs://` globs work
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
from pathlib import Path
from typing import BinaryIO

from llama2_jax.config import UserError, nearest

SEPARATOR = b'<|endoftext|>'  # a line of its own between two documents of a text file
PIECE = 16 * 1024  # bytes; a longer text document is cut into pieces of at most this
PART = 64 * 2**20  # bytes; small files are read together until a part has this much
PARTS = 1024  # larger sources get larger parts, so that a token cache never has many more files than this
EXAMPLES = 16_384  # of a TFDS data set in one part, at least


@dataclasses.dataclass(frozen=True)
class Part:
    """An independent share of a source; the parts of a source in order hold its documents in order.

    Attributes:
      kind: toy, text, jsonl, arrayrecord or tfds.
      names: files, or one toy genre, or one TFDS data set with its split.
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

            yield from toy.documents(self.names[0])
        elif self.kind == 'tfds':
            yield from _read_tfds(self.names[0], self.start, self.stop)
        else:
            for name in self.names:
                yield from _READERS[self.kind](name)


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

    if name != 'documents' and name not in toy.GENRES:
        raise UserError(f'Source {kind}:{name}: {nearest(name, ("documents", *toy.GENRES))}')
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


def _read_jsonl(path: str) -> Iterator[str]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield _text_field(line, f'{path}:{number}')


def _read_arrayrecord(path: str) -> Iterator[str]:
    """Records are JSON objects like the lines of a jsonl file."""
    from array_record.python.array_record_module import ArrayRecordReader

    number = 0
    try:
        reader = ArrayRecordReader(path)
        for number in range(reader.num_records()):
            yield _text_field(reader.read(), f'{path} record {number}')
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


_READERS = {'text': _read_text, 'jsonl': _read_jsonl, 'arrayrecord': _read_arrayrecord}


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


def _read_tfds(name: str, start: int, stop: int) -> Iterator[str]:
    examples = _tfds_examples(name)
    for index in range(start, stop):
        example = examples[index]
        text = example.get('text') if isinstance(example, dict) else None
        if not isinstance(text, str | bytes):
            fields = ', '.join(example) if isinstance(example, dict) else type(example).__name__
            raise UserError(f"Source tfds:{name} example {index} has no field 'text' (it has: {fields}).")
        try:
            yield text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            raise UserError(f'Source tfds:{name} example {index} is not valid UTF-8 at byte {error.start}.') from error
