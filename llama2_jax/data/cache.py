"""The token cache on disk, read at random places; `data/tokenise.py` builds it.

A cache is a directory that belongs to one source, one tokenizer and one held-out share. Each part of the source
(`sources.split`) becomes `train-<part>.arrayrecord` and `heldout-<part>.arrayrecord`: records of RECORD tokens, little-endian,
the last one shorter. The files of a split in order are one stream of tokens. `<part>.json` says that a part is finished and
`meta.json`, written last, that the cache is whole.
"""

import collections
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from llama2_jax.config import UserError
from llama2_jax.files import read_json

SPLITS = ('train', 'heldout')
RECORD = 8192  # tokens
OPEN_FILES = 64  # of one stream; each holds 8 bytes a record, so a stream of 2T tokens in 1,024 files takes 120 MB
RANDOM_ACCESS = 'readahead_buffer_size:0,max_parallelism:0'  # ArrayRecord's options for it


class TokenStream:
    """The tokens of one split of a cache as one long array on disk. Safe to share between threads and to send to processes."""

    def __init__(self, directory: Path, files: list[str], tokens: list[int], dtype: str):
        self._directory, self._files, self._dtype = directory, files, np.dtype(dtype)
        self._ends = np.cumsum(np.asarray(tokens, np.int64))
        self._readers: collections.OrderedDict[int, ArrayRecordReader] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_readers': collections.OrderedDict(), '_lock': None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream, uint16 or uint32.

        Raises:
          UserError: for a record that is damaged or lacking, naming file, record and the way out.
        """
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
    """A finished cache: `train` and `heldout` streams, and counts by split.

    Attributes:
      directory: where it lies.
      documents, tokens, bytes: dicts by split; bytes are of the documents' UTF-8 text.
      empty: documents that were skipped because they hold nothing but white space.
      fingerprint: the number of all tokens and a hash of them, taken when they were written.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        meta = read_json(directory / 'meta.json', limit=2**30)
        parts = meta['parts']
        self.documents, self.tokens, self.bytes = (
            {split: sum(part[split][key] for part in parts) for split in SPLITS} for key in ('documents', 'tokens', 'bytes')
        )
        self.empty = sum(part['empty'] for part in parts)
        digest = hashlib.blake2b(''.join(part['digest'] for part in parts).encode(), digest_size=8).hexdigest()
        self.fingerprint = f'{sum(self.tokens.values()):,} tokens, {digest}'
        self.train, self.heldout = (
            TokenStream(
                directory,
                [file_name(split, i) for i in range(len(parts))],
                [part[split]['tokens'] for part in parts],
                meta['dtype'],
            )
            for split in SPLITS
        )


def file_name(split: str, part: int) -> str:
    """The file of one part of a split, in the cache directory."""
    return f'{split}-{part:05d}.arrayrecord'
