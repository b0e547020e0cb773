"""The token cache on disk, read at random places; `data/tokenise.py` builds it.

A cache is a directory that belongs to the content of one source, one tokenizer and some settings. Each part of the source
(`sources.split`) becomes one file for each column, `<column>-<part>.arrayrecord`: records of RECORD items, little-endian, the
last one shorter. The files of a column in order are one stream. `<part>.json` says that a part is finished and `meta.json`,
written last, that the cache is whole.
"""

import collections
import contextlib
import fcntl
import hashlib
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from llama2_jax.config import UserError
from llama2_jax.data.sources import Tally
from llama2_jax.files import read_json

RECORD = 8192  # items
OPEN_FILES = 64  # of one stream; each holds 8 bytes a record, so a stream of 2T tokens in 1,024 files takes 120 MB
RANDOM_ACCESS = 'readahead_buffer_size:0,max_parallelism:0'  # ArrayRecord's options for it
ANY = 2**62  # bad rows: who asks for the rows says how many may be skipped


class TokenStream:
    """A column of a cache as one long array on disk. Safe to share between threads and to send to processes."""

    def __init__(self, directory: Path, files: list[str], items: list[int], dtype: np.dtype):
        self._directory, self._files, self._dtype = directory, files, dtype
        self._ends = np.cumsum(np.asarray(items, np.int64))
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_readers': collections.OrderedDict(), '_lock': None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop) of the stream, such as tokens: uint16 or uint32.

        Raises:
          UserError: for a record that is damaged or lacking, naming file, record and the way out.
        """
        if start == stop:
            return np.empty(0, self._dtype)
        pieces = []
        for file, first, last in self._pieces(start, stop):
            records = self._records(file, first // RECORD, (last - 1) // RECORD + 1)
            skip = first // RECORD * RECORD
            pieces.append(np.frombuffer(b''.join(records), self._dtype)[first - skip : last - skip])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def locate(self, start: int, stop: int) -> str:
        """Where tokens [start, stop) lie, for people: 'records 3-4 of train-00000.arrayrecord'."""
        places = []
        for file, first, last in self._pieces(start, stop):
            low, high = first // RECORD, (last - 1) // RECORD
            places.append(f'record{f"s {low}-{high}" if high > low else f" {low}"} of {self._files[file]}')
        return ', '.join(places)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The files that hold [start, stop) of the stream, with the tokens of the file that are meant."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f'tokens [{start}, {stop}) of a stream of {len(self)}')
        file = int(np.searchsorted(self._ends, start, side='right'))
        while start < stop:
            base, end = int(self._ends[file - 1]) if file else 0, int(self._ends[file])
            if start < end:
                yield file, start - base, min(stop, end) - base
                start = end
            file += 1

    def _records(self, file: int, first: int, last: int) -> list[bytes]:
        tokens = int(self._ends[file] - (self._ends[file - 1] if file else 0))
        expected = [min(RECORD, tokens - i * RECORD) * self._dtype.itemsize for i in range(first, last)]
        record = first
        try:
            reader, records = self._reader(file), []
            for record in range(first, last):
                records += reader.read([record])
            if [len(data) for data in records] != expected:
                raise ValueError('it has another length than was written')
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            path = self._directory / self._files[file]
            raise UserError(
                f'Record {record} of {path} is corrupt or half-written ({error}); '
                f'delete {self._directory} and run again to rebuild it.'
            ) from error
        return records

    def _reader(self, file: int) -> ArrayRecordReader:
        with self._lock:
            if file in self._readers:
                self._readers.move_to_end(file)
                return self._readers[file]
            # `index_storage_option:offloaded` would hold no index, but takes time in proportion to the file for every read.
            self._readers[file] = ArrayRecordReader(str(self._directory / self._files[file]), RANDOM_ACCESS)
            if len(self._readers) > OPEN_FILES:
                self._readers.popitem(last=False)  # closed when its last reading thread lets go of it
            return self._readers[file]


class Cache:
    """A finished cache, which nobody removes while it is open.

    Attributes:
      directory: where it lies.
      streams: the columns by name.
      counts: what its encoder counted.
      tally: what became of rows.
      digest: a hash of all items, taken when they were written.

    Raises:
      UserError: it is not whole, or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._hold = Hold(directory)
        meta = read_json(directory / 'meta.json', limit=2**30)
        parts = meta['parts']
        self.streams = {
            name: TokenStream(
                directory,
                [file_name(name, i) for i in range(len(parts))],
                [part['items'][name] for part in parts],
                as_dtype(form),
            )
            for name, form in meta['columns'].items()
        }
        self.counts: collections.Counter[str] = collections.Counter()
        self.tally = Tally(ANY)
        for part in parts:
            self.counts.update(part['counts'])
            self.tally.add(as_tally(part['tally']))
        self.digest = hashlib.blake2b(''.join(part['hash'] for part in parts).encode(), digest_size=8).hexdigest()


def as_dtype(form: Any) -> np.dtype:
    """The dtype that JSON holds as numpy's `str` or `descr`."""
    return np.dtype(form if isinstance(form, str) else [tuple(tuple(x) if isinstance(x, list) else x for x in f) for f in form])


def from_tally(tally: Tally) -> dict[str, Any]:
    """A tally for JSON."""
    return {'bad': list(tally.bad), 'dropped': dict(tally.dropped), 'cut': tally.cut}


def as_tally(value: dict[str, Any]) -> Tally:
    """The tally that JSON holds."""
    return Tally(ANY, list(value['bad']), collections.Counter(value['dropped']), value['cut'])


def file_name(column: str, part: int) -> str:
    """The file of one part of a column, in the cache directory."""
    return f'{column}-{part:05d}.arrayrecord'


class Hold:
    """Keeps a cache directory from being removed as stale, for as long as this object lives or the `with` lasts."""

    def __init__(self, directory: Path):
        self._close = weakref.finalize(self, os.close, fd := os.open(directory, os.O_RDONLY))
        with contextlib.suppress(OSError):  # a file system without locks, on which `is_held` finds every cache held
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self._close()


def is_held(directory: Path) -> bool:
    """Whether a process has the cache open, or may have it: where the file system has no locks."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)
