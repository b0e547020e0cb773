"""What source strings name: `toy:NAME`, `text:PATH`, `rows:PATH`, `arrayrecord:PATH`, `tfds:NAME[/CONFIG][:VERSION][#split]`.

A PATH is a glob or a directory, of which all is read; `jsonl:` is another name of `rows:`. `read_documents` gives the texts to
pretrain on, `read_records` whole rows. Everything streams: no file is ever held in memory, but for one that is a single JSON
array (`data/files.py`). `gs://` globs work where `etils.epath` can read them (`pip install gcsfs`), except `arrayrecord:`,
which needs a mounted bucket.
"""

import collections
import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from llama2_jax.config import UserError, listed, nearest, reason
from llama2_jax.data import files
from llama2_jax.files import JSON_BYTES, parse_json, read_whole

SEPARATOR = b'<|endoftext|>'  # a line of its own between two documents of a text file
PIECE = 16 * 1024  # bytes; a longer text document is cut into pieces of at most this
PART = 64 * 2**20  # bytes; small files are read together until a part has this much
PARTS = 1024  # larger sources get larger parts, so that a token cache never has many more files than this
SHOWN = 10  # skipped rows in a table
FILES = 128  # a source of no more files than this has a part for each: then a new file changes no other part
EXAMPLES = 16_384  # of a TFDS data set in one part, at least


@dataclasses.dataclass(frozen=True)
class Record:
    """A row, its file (or data set), and its place for errors: 'a.jsonl:17'.

    `value` may be JSON that is not parsed yet, or the error that reading `fields` raises.
    """

    file: str
    where: str
    value: Any
    end: files.Position | None = None  # from which a file that has grown may be read

    @cached_property
    def fields(self) -> dict[str, Any]:
        """The named fields that are not null.

        Raises:
          UserError: the row is no object, or no JSON.
        """
        if isinstance(self.value, UserError):
            raise self.value
        value = files.parse(self.value, self.where) if isinstance(self.value, bytes) else self.value
        try:
            value = _plain(value) if self.file.startswith('tfds:') else value
        except UnicodeDecodeError as error:
            raise UserError(f'{self.where} is not valid UTF-8 at byte {error.start}.') from error
        if not isinstance(value, dict):
            columns = ': it has another number of columns than the header' if isinstance(value, list) else ''
            raise UserError(f'{self.where} is not an object with named fields{columns}.')
        return {name: inner for name, inner in value.items() if inner is not None}


@dataclasses.dataclass
class Tally:
    """What became of the rows of a source.

    Attributes:
      skip: How many bad rows may be skipped.
      bad: What is wrong with each of those that were.
      dropped: How many rows or comparisons were left out, by reason.
      cut: How many lost turns for length.
    """

    skip: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cut: int = 0

    def refuse(self, error: UserError | str) -> None:
        """Counts a bad row.

        Raises:
          UserError: there are more of them than may be skipped.
        """
        if len(self.bad) >= self.skip:
            raise UserError(f'{error} ({self.skip} bad rows of this source were skipped before.)' if self.skip else str(error))
        self.bad.append(str(error))

    def add(self, other: 'Tally') -> None:
        """Adds what became of other rows."""
        for error in other.bad:
            self.refuse(error)
        self.dropped.update(other.dropped)
        self.cut += other.cut

    def __str__(self) -> str:
        """The counts by reason, such as '3 too long, 1 tie, 2 bad rows'."""
        counts = [f'{count:,} {reason}' for reason, count in sorted(self.dropped.items()) if count]
        return ', '.join(counts + ([f'{len(self.bad):,} bad rows'] if self.bad else []))


@dataclasses.dataclass(frozen=True)
class Part:
    """An independent share of a source; the parts of a source in order hold its documents in order.

    Attributes:
      kind: toy, text, rows, arrayrecord or tfds.
      names: files, or one toy genre or kind of records, or one TFDS data set with its split.
      stamp: changes when the content may have: sizes and times of the files, versions.
      bytes: size of the files as they lie, 0 if unknown; None where reading needs more bytes than the files have (gz).
      start, stop: range of examples (tfds only).
      seed: Seed of the order of the documents within the part; that of a file does not depend on the files beside it.
    """

    kind: str
    names: tuple[str, ...]
    stamp: str
    bytes: int | None = 0
    start: int = 0
    stop: int = 0
    seed: int = dataclasses.field(default=0, repr=False)

    @property
    def grows(self) -> bool:
        """Whether it is one file, not compressed, to which more may be appended."""
        return self.kind in ('text', 'rows') and len(self.names) == 1 and self.bytes is not None

    def documents(
        self, start: files.Position = files.BEGIN, tally: Tally | None = None
    ) -> Iterator[tuple[str, files.Position | None]]:
        """The documents, streamed, empty ones too, each with the position after it as `files.read_rows` has it.

        Args:
          start: Where to begin in a part that grows.

        Raises:
          UserError: a row without text, if there are more than `tally` allows (by default none).
        """
        if self.kind == 'toy':
            from llama2_jax import toy

            if self.names[0] in toy.RECORDS:
                raise UserError(f'Source toy:{self.names[0]} holds records, not documents.')
            for text in toy.documents(self.names[0]):
                yield text, None
        elif self.kind == 'text':
            for name in self.names:
                yield from _read_text(name, start)
        else:
            for record in self.records(start):
                try:
                    text = _text_field(record)
                except UserError as error:
                    (tally or Tally()).refuse(error)
                else:
                    yield text, record.end

    def records(self, start: files.Position = files.BEGIN) -> Iterator[Record]:
        """The rows, streamed. What is wrong with one is found when its fields are read.

        Raises:
          UserError: the source holds plain text, or a file is damaged.
        """
        name = self.names[0]
        if self.kind == 'toy':
            from llama2_jax import toy

            if name not in toy.RECORDS:
                raise UserError(f'Source toy:{name} holds documents, not records; {nearest(name, toy.RECORDS)}')
            for i, fields in enumerate(toy.RECORDS[name]()):
                yield Record(f'toy:{name}', f'toy:{name} record {i}', fields)
        elif self.kind == 'tfds':
            for where, example in _tfds_rows(name, self.start, self.stop):
                yield Record(f'tfds:{name}', where, example)
        elif self.kind == 'text':
            raise UserError(f'Source text:{name} is plain text; records are read from rows:, arrayrecord:, tfds: and toy:.')
        else:
            for name in self.names:
                for row in _array_records(name) if self.kind == 'arrayrecord' else files.read_rows(name, start):
                    yield Record(name, *row)


def skipped(bad: list[str]) -> str:
    """Lines that say which rows were skipped and why, the first few of them; '' for none."""
    more = [f'… and {len(bad) - SHOWN:,} more'] if len(bad) > SHOWN else []
    return ''.join(f'\nSkipped: {line}' for line in bad[:SHOWN] + more)


def read_records(source: str) -> Iterator[Record]:
    """All rows of a source string, in order.

    Raises:
      UserError: unknown kind, nothing there, plain text, or a corrupt file, naming file and line or record.
    """
    for part in split(source):
        yield from part.records()


def read_documents(source: str, tally: Tally | None = None) -> Iterator[str]:
    """All documents of a source string, in order; `tally` counts what is wrong, and says how much of it may be skipped.

    Raises:
      UserError: unknown kind, nothing there, or a corrupt file, naming file and line, byte or record.
    """
    for part in split(source):
        for text, _ in part.documents(tally=tally):
            yield text


def fingerprint(source: str) -> str:
    """The size of a source and a hash of its content, whatever its files are called and whenever they were written.

    Raises:
      UserError: unknown kind, or nothing there.
    """
    digest, size = hashlib.blake2b(digest_size=8), 0
    for part in split(source):
        for block in _blocks(part):
            digest.update(block)
            size += len(block) * (part.kind not in VERSIONED)
    return f'{size:,} bytes, {digest.hexdigest()}' if size else digest.hexdigest()


def absolute(source: str) -> str:
    """A source string that means the same in every directory."""
    kind, _, name = source.partition(':')
    return source if kind in VERSIONED or '://' in name else f'{kind}:{os.path.abspath(os.path.expanduser(name))}'


def content(part: Part, prefix: int = 0) -> tuple[str, str]:
    """Hashes of the content of a part, and of its first `prefix` bytes ('' if it has fewer); a versioned one is its version."""
    digest, size, first = hashlib.blake2b(digest_size=16), 0, ''
    for block in _blocks(part):
        if size <= prefix <= size + len(block):
            start = digest.copy()
            start.update(block[: prefix - size])
            first = start.hexdigest()
        digest.update(block if block or len(part.names) == 1 else repr(size).encode())  # where one file ends, if there are more
        size += len(block)
    return digest.hexdigest(), first


VERSIONED = ('toy', 'tfds')


def _blocks(part: Part) -> Iterator[bytes]:
    if part.kind in VERSIONED:
        yield repr(part).encode()
        return
    for name in part.names:
        with files.open_raw(name) as file:
            while block := file.read(2**20):
                yield block
        yield b''


def split(source: str) -> list[Part]:
    """Divides a source into parts that can be read independently; depends on the source alone, not on who reads it.

    Raises:
      UserError: unknown kind or genre, or nothing there.
    """
    kind, colon, name = source.partition(':')
    if kind in ('parquet', 'csv', 'json', 'arrow', 'hf'):
        raise UserError(f'Source {source!r}: write rows:{name or "PATH"}; the content of a file says what its format is.')
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
    reader = 'rows' if kind == 'jsonl' else kind
    found = list(_glob(_inside(reader, pattern)))
    if not found:
        raise UserError(f'Source {kind}:{pattern} matches no file.')
    target, size = PART, sum(size for _, size, _ in found)
    while target * PARTS < size:  # by doubling, so that a file more rarely changes how the others are put together
        target *= 2
    parts, group, total = [], [], 0
    for file in found:
        group.append(file)
        total += file[1]
        if total >= target or file is found[-1] or len(found) <= FILES:
            names, sizes, times = zip(*group, strict=True)
            packed = any(name.endswith(('.gz', '.zst', '.zstd', '.parquet', '.arrow')) for name in names)
            parts.append(Part(reader, names, f'{sizes}{times}', None if packed else total))
            group, total = [], 0
    return parts


def _split_toy(kind: str, name: str) -> list[Part]:
    from llama2_jax import toy

    if name != 'documents' and name not in toy.GENRES and name not in toy.RECORDS:
        raise UserError(f'Source {kind}:{name}: {nearest(name, ("documents", *toy.GENRES, *toy.RECORDS))}')
    code = b''.join(
        path.read_bytes() for path in sorted(Path(toy.__file__).parent.glob('*.py'))
    )  # generated: its code is its content
    stamp = hashlib.sha256(code).hexdigest()
    return [Part(kind, (genre,), stamp, seed=i) for i, genre in enumerate(toy.GENRES if name == 'documents' else (name,))]


def _split_tfds(kind: str, name: str) -> list[Part]:
    examples = _tfds_examples(name)
    total = len(examples)
    size = max(EXAMPLES, -(-total // PARTS))
    stamp = f'{examples.dataset_info.full_name} {total}'
    return [Part(kind, (name,), stamp, 0, start, min(start + size, total), start // size) for start in range(0, total, size)]


_SPLITTERS: dict[str, Callable[[str, str], list[Part]]] = {
    'toy': _split_toy,
    'text': _split_files,
    'rows': _split_files,
    'jsonl': _split_files,
    'arrayrecord': _split_files,
    'tfds': _split_tfds,
}
_FORMS = {
    'toy': 'toy:documents or toy:<genre>',
    'text': 'text:PATH',
    'rows': 'rows:PATH',
    'jsonl': 'rows:PATH',
    'arrayrecord': 'arrayrecord:PATH',
    'tfds': 'tfds:NAME[/CONFIG][:VERSION][#split]',
}


KINDS = tuple(_SPLITTERS)
SPLIT_NAMES = {'train': 'train', 'test': 'test', 'validation': 'validation', 'valid': 'validation', 'val': 'validation'}


def _inside(kind: str, pattern: str) -> list[str] | str:
    """The files in a directory that a source of a kind reads; a glob as it is.

    Raises:
      UserError: a directory without such files, or with several splits of a data set.
    """
    folder = Path(pattern).expanduser()
    if '://' in pattern or not folder.is_dir():
        return pattern
    state = folder / 'state.json'  # of Hugging Face's save_to_disk
    if state.is_file() and b'_data_files' in (content := read_whole(state, JSON_BYTES)):
        entries = parse_json(content, state).get('_data_files')
        entries = entries if isinstance(entries, list) else [entries]
        names = [entry.get('filename') if isinstance(entry, dict) else None for entry in entries]
        if not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise UserError(f'{state} is damaged: _data_files is no list of the names of files beside it.')
        if names:
            return [str(folder / name) for name in names]
    found = sorted(path for path in folder.rglob('*') if path.is_file())
    found = [path for path in found if not any(name.startswith('.') for name in path.relative_to(folder).parts)]
    wanted = {'rows': lambda name: files.is_rows(name) and name not in _METADATA, 'arrayrecord': lambda name: 'arrayrec' in name}
    found = [path for path in found if kind == 'text' or wanted[kind](path.name)]
    if not found:
        raise UserError(f'Source {kind}:{pattern} is a directory without files of {"text" if kind == "text" else "rows"}.')
    words = {word for path in found for word in re.split(r'[-._/]', str(path.relative_to(folder)))}
    splits = {SPLIT_NAMES[word] for word in words & SPLIT_NAMES.keys()}
    if len(splits) > 1:
        names = ', '.join(sorted(splits))
        raise UserError(f'Source {kind}:{pattern} has the splits {names}: name the files or the folder of one.')
    return list(map(str, found))


_METADATA = ('state.json', 'dataset_info.json', 'dataset_infos.json', 'dataset_dict.json', 'config.json', 'metadata.json')


def _glob(pattern: list[str] | str) -> Iterator[tuple[str, int, int]]:
    """Path, size and modification time of the files that match, sorted by path."""
    if not isinstance(pattern, list) and '://' in pattern:
        from etils import epath

        parent = re.match(r'[^*?\[]*/', pattern).group()
        paths = sorted(path for path in epath.Path(parent).glob(pattern[len(parent) :]) if path.is_file())
        for path in paths:
            yield str(path), path.stat().length, int(path.stat().mtime)
    else:
        if not isinstance(pattern, list):
            literal = Path(pattern).expanduser()  # may hold brackets
            pattern = [str(literal)] if literal.is_file() else sorted(glob.glob(str(literal), recursive=True))
        for path in map(Path, pattern):
            if path.is_file():
                yield str(path), path.stat().st_size, path.stat().st_mtime_ns


# Reading


def _read_text(path: str, start: files.Position) -> Iterator[tuple[str, files.Position | None]]:
    """Documents of a text file: parted by lines that are `<|endoftext|>`, long ones cut by `_cut`; nothing else is dropped.

    Reading may begin where a line does, after a document.
    """
    buffer, offset, line_start = bytearray(), start[0], True

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

    with files.read_errors(path), files.open_file(path) as file:
        files.check_text(path, file.peek(files.HEAD)[: files.HEAD])
        seekable = file.seekable()
        if offset:
            file.seek(offset)
        elif seekable:
            offset = file.tell()  # after a byte order mark
        while line := file.readline(PIECE):
            if line_start and line.rstrip(b'\r\n') == SEPARATOR:
                text = decode(len(buffer))
                offset += len(line)
                yield text, (offset, 0) if seekable and line.endswith(b'\n') else None
                continue
            buffer += line
            line_start = line.endswith(b'\n')
            while len(buffer) > PIECE:
                text = decode(_cut(buffer))
                yield text, (offset, 0) if seekable and text.endswith('\n') else None
    if buffer:
        yield decode(len(buffer)), None


def _cut(buffer: bytearray) -> int:
    """Where to cut: after the last blank line within PIECE bytes, else after the last newline, else space, else character."""
    for marks in ((b'\n\n', b'\n\r\n'), (b'\n',), (b' ',)):
        at, mark = max((buffer.rfind(mark, 0, PIECE), mark) for mark in marks)
        if at >= 0:
            return at + len(mark)
    end = PIECE
    while end > PIECE - 4 and buffer[end] & 0xC0 == 0x80:  # the second to fourth byte of a character
        end -= 1
    return end


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
        raise UserError(
            f'{path} record {number} cannot be read, the file is corrupt or half-written: {reason(error)}.'
        ) from error


def _text_field(record: Record) -> str:
    text = record.fields.get('text')
    if isinstance(text, bytes):
        text = text.decode()
    if not isinstance(text, str):
        raise UserError(f"{record.where} has no field 'text' that is a text (it has: {listed(record.fields)}).")
    try:
        text.encode()  # JSON can spell half a surrogate pair, which is no text
    except UnicodeEncodeError as error:
        raise UserError(f"{record.where}: 'text' is no text: {error}.") from error
    return text


def _tfds_examples(name: str):
    """Random access to a TFDS data set without TensorFlow; downloads and prepares it (as array_record) when absent."""
    import tensorflow_datasets as tfds

    dataset, _, split = name.partition('#')
    with _tfds_errors(name):
        return tfds.data_source(dataset, split=split or 'train')


def check_tfds(name: str) -> None:
    """Raises a UserError if TFDS knows no data set of this name; downloads nothing."""
    import tensorflow_datasets as tfds

    with _tfds_errors(name):
        tfds.builder(name.partition('#')[0])


@contextlib.contextmanager
def _tfds_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # TFDS raises whatever its builders raise
        raise UserError(f'Source tfds:{name} cannot be opened: {reason(error)}.') from error


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


def as_source(rows: str) -> str:
    """A source of rows, or the path of a file of rows as one."""
    if re.match(r'(toy|rows|jsonl|arrayrecord|tfds):', rows):
        return rows
    return f'jsonl:{glob.escape(rows) if Path(rows).exists() else rows}'  # a file's own name may hold [ or *


def rows_fingerprint(rows: list[tuple[Any, str]]) -> int:
    """A number that changes with rows (content, where)."""
    return zlib.crc32(json.dumps([row for row, _ in rows], sort_keys=True, default=str).encode())
