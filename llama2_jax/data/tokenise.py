"""Builds token caches (`data/cache.py`): a source is tokenised once, in parallel, by all processes of a run.

This process reads documents or rows and writes records, others tokenise, so that one large `.gz` keeps all cores busy. What is
built depends only on the source, not on how many processes or hosts build it, nor on earlier caches. A build that was killed
resumes with the missing parts. Unchanged parts are taken from an earlier cache of the same source, and of a file that has
grown all but its last chunk; that cache is then removed, unless a process has it open.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tqdm import tqdm

from llama2_jax.config import UserError
from llama2_jax.data import sources
from llama2_jax.data.cache import ANY, RECORD, Hold, TokenStream, as_tally, file_name, from_tally, is_held
from llama2_jax.data.files import BEGIN, Position
from llama2_jax.data.sources import Part, Tally
from llama2_jax.data.workers import run_in_order
from llama2_jax.text.printable import printable

FORMAT = 3  # change it when the same source would be read, cut or stored differently
CHUNK = 2**20  # characters that a process tokenises at once; documents are shuffled within a chunk
FEW = 4  # chunks: no more than this are tokenised in this process, for starting others takes seconds
BLOCK = 2**20  # items copied at once


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Neighbouring documents or rows of one part.

    Attributes:
      part: Index of the part.
      seed: Of the part.
      number: Of the chunk in the part.
      units: The documents or rows.
      size: Their size, in characters or bytes.
      start: Where they begin in a file that may grow.
    """

    part: int
    seed: int
    number: int
    units: list[Any]
    size: int
    start: Position | None


@dataclasses.dataclass
class Encoded:
    """What became of a chunk, or of several: items by column, what the encoder counts, and the rows that were left out."""

    columns: dict[str, np.ndarray]
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    tally: Tally = dataclasses.field(default_factory=lambda: Tally(ANY))


class Encoder(Protocol):
    """Chunks to items; it is sent to the tokenising processes.

    Attributes:
      key: What the items depend on besides the source and the code; code that changes what it makes of a row changes its key.
      columns: Name and dtype.
      by_content: Whether a part is as it was if its bytes are, or if sizes and times of its files are.
    """

    key: tuple
    columns: dict[str, np.dtype]
    by_content: bool

    def read(self, part: Part, start: Position) -> Iterator[tuple[Any, int, Position | None]]:
        """Documents or rows of a part with their sizes and the positions after them."""

    def __call__(self, chunk: Chunk) -> Encoded:
        """The items of a chunk."""


def build(
    source: str,
    encoder: Encoder,
    root: str | os.PathLike,
    *,
    skip: int = ANY,
    workers: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[str], None] = lambda name: None,
) -> Path:
    """The directory of the cache of a source under `root`, built first if it is not there (or not whole).

    Args:
      skip: bad rows after which there is no use in going on.
      workers: processes that tokenise; None for one a core.
      barrier: called with a name, returns when all processes of the run have called it. Processes that see the same
        directory share the work, those with disks of their own build a cache each.

    Raises:
      UserError: for anything wrong with the source, or a directory that cannot be written.
    """
    if '://' in str(root):
        raise UserError(f'The token cache cannot lie at {root}, it needs a file system: mount the bucket and name the mount.')
    parts = _split(source, encoder)
    family = f'{_readable(source)}-{_hash(FORMAT, RECORD, CHUNK, sources.absolute(source), encoder.key)}'
    directory = Path(root).expanduser() / f'{family}-{_hash(parts)}'
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with Hold(directory):
            members = _members(directory, process_index, process_count, barrier)
            first = members[0] == process_index
            if first:
                _remove_damaged(directory)
            barrier('cache checked')
            if not (directory / 'meta.json').exists():
                mine = range(members.index(process_index), len(parts), len(members))
                todo = [i for i in mine if not _info_path(directory, i).exists()]
                with contextlib.ExitStack() as held:
                    jobs = _plan(directory, _others(directory, family, held), parts, todo)
                    _build_parts(directory, jobs, encoder, workers or os.cpu_count(), skip, source if first else '')
                if todo and _split(source, encoder) != parts:
                    raise UserError(f'Source {source} has changed while it was tokenised; run again.')
            barrier('cache built')
            if first and not (directory / 'meta.json').exists():
                infos = [json.loads(_info_path(directory, i).read_text()) for i in range(len(parts))]
                columns = {name: _form(dtype) for name, dtype in encoder.columns.items()}
                _write_json(directory / 'meta.json', {'source': source, 'columns': columns, 'parts': infos})
                _tidy(directory, family)
            barrier('cache ready')
            (directory / f'member-{process_index}').unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f'The token cache {directory} cannot be built: {error}. LLAMA2_JAX_CACHE names another place for it.'
        ) from error
    return directory


def default_root() -> str:
    """Where caches lie if nobody says."""
    return os.environ.get('LLAMA2_JAX_CACHE') or '~/.cache/llama2_jax'


def token_dtype(tokenizer) -> np.dtype:
    """The smallest dtype for its ids."""
    return np.dtype('<u2' if tokenizer.vocab_size <= 2**16 else '<u4')


def _split(source: str, encoder: Encoder) -> list[Part]:
    parts = sources.split(source)
    if encoder.by_content:
        parts = [dataclasses.replace(part, stamp=sources.content(part)[0]) for part in parts]
    return parts


def _readable(source: str) -> str:
    kind, _, name = source.partition(':')
    return re.sub(r'[^A-Za-z0-9]+', '-', f'{kind}-{"-".join(Path(name).parts[-2:])}').strip('-')[:60]


def _hash(*values) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def _form(dtype: np.dtype) -> Any:
    return dtype.str if dtype.names is None else dtype.descr


def _members(directory: Path, index: int, count: int, barrier: Callable[[str], None]) -> list[int]:
    """The processes of the run that see this directory: all of them on shared storage, one on a disk of its own."""
    if count == 1:
        return [index]
    for stale in directory.glob('member-*'):
        stale.unlink(missing_ok=True)
    barrier('cache cleared')
    (directory / f'member-{index}').touch()
    barrier('cache joined')
    return sorted(int(path.name.removeprefix('member-')) for path in directory.glob('member-*'))


def _tidy(directory: Path, family: str) -> None:
    """Removes what killed builds left behind (a file that is being written is younger), and caches of what the source was."""
    for path in directory.glob('*.tmp'):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
    for other in directory.parent.glob(f'{family}-*'):
        with contextlib.suppress(OSError):
            if other != directory and not is_held(other):
                shutil.rmtree(other)


def _info_path(directory: Path, part: int) -> Path:
    return directory / f'{part:05d}.json'


def _write_json(path: Path, value) -> None:
    temporary = _temporary(path)
    temporary.write_text(json.dumps(value))
    temporary.replace(path)


def _temporary(path: Path) -> Path:
    """A name of this process's own, so that two runs that build the same cache at once do not meet; the results are equal."""
    return path.with_name(f'{path.name}.{os.uname().nodename}-{os.getpid()}.tmp')


# Earlier caches


_Old = tuple[Path, int, dict[str, Any]]  # a finished part of another cache: directory, index and info


@dataclasses.dataclass(frozen=True)
class _Job:
    """A part to tokenise, all of it or, where an earlier cache has its beginning, the rest."""

    index: int
    part: Part
    old: _Old | None = None

    @property
    def start(self) -> Position:
        """Where the rest begins."""
        return tuple(self.old[2]['resume']['start']) if self.old else BEGIN

    def chunks(self, encoder: Encoder) -> Iterator[Chunk]:
        """What is to be tokenised."""
        return cut(self.index, self.part, encoder, self.start, self.old[2]['resume']['number'] if self.old else 0)


def _is_whole(directory: Path, part: int, info: dict[str, Any]) -> bool:
    """Whether the files of a part are there with the sizes they had."""
    try:
        return all((directory / file_name(name, part)).stat().st_size == size for name, size in info['sizes'].items())
    except FileNotFoundError:
        return False


def _remove_damaged(directory: Path) -> None:
    """Makes a cache unfinished again where files are gone, cut or cannot be read."""
    for path in directory.glob('[0-9]*.json'):
        try:
            whole = _is_whole(directory, int(path.stem), json.loads(path.read_text()))
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            (directory / 'meta.json').unlink(missing_ok=True)
            path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads((directory / 'meta.json').read_text())
        except ValueError:
            (directory / 'meta.json').unlink()


def _others(directory: Path, family: str, held: contextlib.ExitStack) -> list[_Old]:
    """The finished parts of other caches of the source: directory, index and info; none of them is removed while `held`."""
    found = []
    for other in sorted(directory.parent.glob(f'{family}-*')):
        if other != directory:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                held.enter_context(Hold(other))
                for path in sorted(other.glob('[0-9]*.json')):
                    index, info = int(path.stem), json.loads(path.read_text())
                    if _is_whole(other, index, info):
                        found.append((other, index, info))
    return found


def _plan(directory: Path, others: list[_Old], parts: list[Part], todo: list[int]) -> list[_Job]:
    """What is to be tokenised; parts that another cache has are linked from there."""
    jobs = []
    for i in todo:
        part, old = parts[i], None
        for other, index, info in others:
            if info['part'] != _identity(part):
                continue
            content, prefix = (info['content'], '') if info['stamp'] == part.stamp else sources.content(part, info['bytes'] or 0)
            if content == info['content']:
                with contextlib.suppress(OSError):
                    _link(other, index, directory, i, info | {'stamp': part.stamp})
                    break
            if part.grows and prefix == info['content'] and info['resume']:
                old = other, index, info
        else:
            jobs.append(_Job(i, part, old))
    return jobs


def _identity(part: Part) -> list[Any]:
    return [part.kind, list(part.names), part.start, part.stop, part.seed]


def _link(old: Path, old_index: int, new: Path, index: int, info: dict[str, Any]) -> None:
    """Gives a new cache the files that an old one has of a part."""
    for name in info['sizes']:
        path = new / file_name(name, index)
        temporary = _temporary(path)
        temporary.unlink(missing_ok=True)
        try:
            os.link(old / file_name(name, old_index), temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(old / file_name(name, old_index), temporary)
        temporary.replace(path)
        temporary.unlink(missing_ok=True)  # which stays where both are the same file
    _write_json(_info_path(new, index), info)


# Tokenising


def encode_all(chunks: Iterable[Chunk], encoder: Encoder, workers: int = 1) -> Iterator[tuple[Chunk, Encoded]]:
    """Encodes chunks in order, on `workers` processes if there are enough of them; what comes back has no units."""
    chunks, few, size = iter(chunks), [], 0
    for chunk in chunks:
        few.append(chunk)
        size += chunk.size
        if size > FEW * CHUNK:
            break
    work, everything = _Work(encoder), itertools.chain(few, chunks)
    yield from map(work, everything) if workers == 1 or size <= FEW * CHUNK else run_in_order(everything, work, workers)


@dataclasses.dataclass(frozen=True)
class _Work:
    encoder: Encoder

    def __call__(self, chunk: Chunk) -> tuple[Chunk, Encoded]:
        return dataclasses.replace(chunk, units=[]), self.encoder(chunk)


def cut(index: int, part: Part, encoder: Encoder, start: Position = BEGIN, number: int = 0) -> Iterator[Chunk]:
    """Cuts a part into chunks of about CHUNK characters, at least one."""
    units, size, here = [], 0, start if part.grows else None
    for unit, length, end in encoder.read(part, start):
        units.append(unit)
        size += length
        if size >= CHUNK:
            yield Chunk(index, part.seed, number, units, size, here)
            units, size, number, here = [], 0, number + 1, end if part.grows else None
    yield Chunk(index, part.seed, number, units, size, here)


# Writing


def _build_parts(directory: Path, jobs: list[_Job], encoder: Encoder, workers: int, skip: int, title: str) -> None:
    """Writes the files of parts, each part followed by the JSON that says it is finished."""
    sizes = [job.part.bytes for job in jobs]
    total = None if None in sizes else sum(sizes) - sum(job.start[0] for job in jobs) or None  # unknown for gz
    by_index, budget = {job.index: job for job in jobs}, Tally(skip)
    with tqdm(
        total=total, desc=f'tokenising {printable(title, line=True)}', unit='B', unit_scale=True, disable=not title or not jobs
    ) as bar:

        def watched(results: Iterable[tuple[Chunk, Encoded]]) -> Iterator[tuple[Chunk, Encoded]]:
            for chunk, encoded in results:
                budget.add(encoded.tally)
                bar.update(chunk.size)
                yield chunk, encoded

        results = watched(encode_all((chunk for job in jobs for chunk in job.chunks(encoder)), encoder, workers))
        for index, mine in itertools.groupby(results, lambda result: result[0].part):
            _write_part(directory, by_index[index], encoder, mine)


def _write_part(directory: Path, job: _Job, encoder: Encoder, results: Iterable[tuple[Chunk, Encoded]]) -> None:
    counts, tally, resume = Counter(), Tally(ANY), None
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(_RecordWriter(directory / file_name(name, job.index), dtype))
            for name, dtype in encoder.columns.items()
        }
        if job.old:
            other, index, info = job.old
            counts.update(info['resume']['counts'])
            tally.add(as_tally(info['resume']['tally']))
            for name, writer in writers.items():
                stream = TokenStream(other, [file_name(name, index)], [info['items'][name]], encoder.columns[name])
                end = info['resume']['items'][name]
                for first in range(0, end, BLOCK):
                    writer.write(stream.read(first, min(first + BLOCK, end)))
        for chunk, encoded in results:
            if chunk.start:
                before = {'items': {name: writer.items for name, writer in writers.items()}, 'counts': dict(counts)}
                resume = {'start': chunk.start, 'number': chunk.number, 'tally': from_tally(tally), **before}
            for name, writer in writers.items():
                writer.write(encoded.columns[name])
            counts.update(encoded.counts)
            tally.add(encoded.tally)
    info = {
        'part': _identity(job.part),
        'stamp': job.part.stamp,
        'bytes': job.part.bytes,
        'content': job.part.stamp if encoder.by_content else sources.content(job.part)[0],
        'items': {name: writer.items for name, writer in writers.items()},
        'sizes': {name: (directory / file_name(name, job.index)).stat().st_size for name in writers},
        'hash': ''.join(writer.hash.hexdigest() for writer in writers.values()),
        'counts': counts,
        'tally': from_tally(tally),
        'resume': resume,
    }
    _write_json(_info_path(directory, job.index), info)


class _RecordWriter:
    """Writes a stream of items as records; the file appears under its name when all of it is written.

    Attributes:
      items: How many were written.
      hash: Of these.
    """

    def __init__(self, path: Path, dtype: np.dtype):
        self._path, self._temporary, self._dtype = path, _temporary(path), dtype
        self._rest = np.empty(0, dtype)
        self.items, self.hash = 0, hashlib.blake2b(digest_size=8)

    def __enter__(self) -> Self:
        self._writer = self._checked(ArrayRecordWriter, str(self._temporary), 'group_size:1,uncompressed')
        return self

    def write(self, items: np.ndarray) -> None:
        items = items.astype(self._dtype, copy=False)
        self.items += len(items)
        self.hash.update(items.tobytes())
        items = np.concatenate([self._rest, items])
        whole = len(items) // RECORD * RECORD
        for record in items[:whole].reshape(-1, RECORD):
            self._checked(self._writer.write, record.tobytes())
        self._rest = items[whole:]

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            if len(self._rest):
                self._checked(self._writer.write, self._rest.tobytes())
            self._checked(self._writer.close)
            self._temporary.replace(self._path)
        else:
            with contextlib.suppress(RuntimeError, ValueError):  # the disk may be full; the first error is the one to tell
                self._writer.close()
            self._temporary.unlink(missing_ok=True)

    def _checked(self, action: Callable[..., Any], *arguments) -> Any:
        try:
            return action(*arguments)
        except (RuntimeError, ValueError) as error:  # what ArrayRecord raises, for example without space left
            raise UserError(f'{self._path} could not be written: {error}.') from error
