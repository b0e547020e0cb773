"""Pretraining batches: batch k is a function of (seed, k, mixture) alone.

The same on one host or sixty-four, with any number of data workers, and after a restart, because nothing is a queue: row r of
the run is row r of an interleave of sources, each source's sequences are shuffled by an index permutation with a new seed every
epoch, and every sequence is read from its place in the token cache. So a run may start at any step at no cost, and the position
is the step. (Under an epoch limit that binds, the shares depend on the length of the run too.)
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated

import grain
import numpy as np
from absl import flags

from llama2_jax.config import Config, Names, UserError, between, resumable
from llama2_jax.data import packing
from llama2_jax.data.cache import TokenStream
from llama2_jax.data.documents import Documents, build
from llama2_jax.data.mixing import Interleave, as_shares, parse_mixture, source_seed, water_fill
from llama2_jax.data.tokenise import default_root
from llama2_jax.data.workers import end_with_parent

Batch = dict[str, np.ndarray]
THREADS = 1  # reading ahead; more only take the interpreter from each other, unless the disk is slow
PREFETCH = 8  # batches


@dataclasses.dataclass(frozen=True)
class DataConfig(Config):
    """What to train on.

    Attributes:
      mixture: `source[:share][@epochs], source…` (sources: `data/sources.py`, shares: `data/mixing.py`).
      cache_dir: Folder of token caches; '': $LLAMA2_JAX_CACHE, or ~/.cache/llama2_jax.
      heldout: Share of each source's documents held out.
      workers: Processes that read ahead; 0: a thread, which reads millions of tokens a second. Slow network disks may need some;
        a script that uses them needs an `if __name__ == '__main__'` guard.
      mask_documents: Keeps attention inside a document. The paper lets it cross.
    """

    mixture: Annotated[str, Names('mixture', 'documents')] = 'toy:documents'
    cache_dir: str = resumable('')
    heldout: float = between(0.01, 0, 0.999)
    workers: int = resumable(0)
    mask_documents: bool = False


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """One source as the run uses it: `weight` is its share of the run's sequences, `documents` and `tokens` are to train on."""

    name: str
    weight: float
    documents: int
    tokens: int
    epochs: float
    heldout_tokens: int
    heldout_bytes: int

    def __str__(self) -> str:
        counts = f'{self.documents:>12,} {self.tokens:>16,} {self.epochs:>8.2f} {self.heldout_tokens:>16,}'
        return f'{self.name:<40} {self.weight:>8.4f} {counts}'


class PretrainData:
    """Batches of a mixture for one process of a run.

    Args:
      tokenizer: a `llama2_jax.text.tokenizer.Tokenizer`.
      length: L, targets in a sequence.
      batch_size: B, sequences in the batch of all processes together.
      seed: any integer.
      steps: batches in the run.
      process_index, process_count: process p yields rows [p * b, (p + 1) * b) of each batch, b = B / process_count.
      barrier: called with a name, returns when all processes have called it; needed when there are several.

    Attributes:
      sources: `SourceInfo` of each source of the mixture.
      fingerprints: of the tokens of each source.

    Raises:
      UserError: for anything wrong with the mixture, its sources or the batch size.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer,
        *,
        length: int,
        batch_size: int,
        seed: int,
        steps: int,
        process_index: int = 0,
        process_count: int = 1,
        barrier: Callable[[str], None] | None = None,
    ):
        if batch_size % process_count:
            raise UserError(f'A batch of {batch_size} sequences cannot be divided among {process_count} processes.')
        self._length, self._bos, self._workers = length, tokenizer.bos_id, config.workers
        self._batch_size, self._rows, self.steps = batch_size, batch_size // process_count, steps
        self._index, self._count = process_index, process_count
        components = parse_mixture(config.mixture)
        root = config.cache_dir or default_root()
        self._caches = [
            build(
                component.source,
                tokenizer,
                root,
                heldout=config.heldout,
                process_index=process_index,
                process_count=process_count,
                barrier=barrier or (lambda name: None),
            )
            for component in components
        ]
        self.fingerprints = {
            component.source: cache.fingerprint for component, cache in zip(components, self._caches, strict=True)
        }
        counts = [packing.count(len(cache.train), length) for cache in self._caches]
        for component, cache, count in zip(components, self._caches, counts, strict=True):
            _check_count(component.source, cache, count)
        components = as_shares(components, counts)
        shares = water_fill(components, counts, steps * batch_size)
        self._sources = [
            grain.MapDataset.source(_Sequences(i, cache.train, length)).shuffle(source_seed(seed, component.source)).repeat()
            for i, (component, cache) in enumerate(zip(components, self._caches, strict=True))
        ]
        self._order = Interleave(shares, steps * batch_size)
        self.sources = [
            SourceInfo(
                name=component.source,
                weight=float(share),
                documents=cache.documents['train'],
                tokens=cache.tokens['train'],
                epochs=float(share * steps * batch_size / count),
                heldout_tokens=cache.tokens['heldout'],
                heldout_bytes=cache.bytes['heldout'],
            )
            for component, cache, count, share in zip(components, self._caches, counts, shares, strict=True)
        ]

    def train(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, … steps - 1, this process's rows; starting late costs nothing.

        Each is a dict: tokens and segment_ids int32 [b, L+1] (`packing.pack`), record_ids int64 [b, 2] (source, sequence).

        Raises:
          UserError: while iterating, for a damaged cache record.
        """
        rows = grain.MapDataset.select_from_datasets(self._sources, self._order)
        batches = rows.batch(self._rows, batch_fn=self._collate)[self._index :: self._count][start_step:]
        if not len(batches):
            return iter(())
        threads = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=PREFETCH)
        dataset = batches.to_iter_dataset(threads)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain asks a flag of its own, also in a notebook or a plain script
                flags.FLAGS.mark_as_parsed()
            dataset = grain.experimental.WithOptionsIterDataset(dataset, grain.experimental.DatasetOptions(min_shm_size=2**62))
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options, end_with_parent)
        return _Closing(iter(dataset))

    def heldout(self, source: int) -> Iterator[Batch]:
        """The held-out sequences of a source once, as batches like those of `train`; the same number on every process.

        In a fixed shuffled order, so that the first few batches are a fair sample. Rows beyond the end are all padding, with
        record_ids -1. A source too small to have a held-out document yields nothing.
        """
        sequences = _Sequences(source, self._caches[source].heldout, self._length)
        for first in range(0, len(sequences), self._batch_size):
            mine = range(first + self._index * self._rows, first + (self._index + 1) * self._rows)
            yield self._collate([sequences.shuffled(i) if i < len(sequences) else _PADDING for i in mine])

    def describe(self, record_ids: np.ndarray) -> list[str]:
        """Rows of `record_ids` of `train` for people.

        Such as 'text:corpus/*.txt sequence 17 (records 3-4 of train-00000.arrayrecord)'.
        """
        names = []
        for source, sequence in np.asarray(record_ids).tolist():
            stream = self._caches[source].train
            place = stream.locate(*packing.window(sequence, self._length, len(stream)))
            names.append(f'{self.sources[source].name} sequence {sequence} ({place})')
        return names

    def table(self) -> str:
        """The sources as a table to print."""
        head = f'{"source":<40} {"weight":>8} {"documents":>12} {"tokens":>16} {"epochs":>8} {"held-out tokens":>16}'
        return '\n'.join([head, *map(str, self.sources)])

    def _collate(self, rows: Sequence[tuple[np.ndarray, tuple[int, int]]]) -> Batch:
        tokens, segment_ids = packing.pack([ids for ids, _ in rows], self._length, self._bos)
        return {'tokens': tokens, 'segment_ids': segment_ids, 'record_ids': np.array([record for _, record in rows], np.int64)}


class _Closing(Iterator[Batch]):
    """Closes a grain iterator, with its threads and processes, when it is dropped or the program ends: grain does so too late."""

    def __init__(self, iterator: grain.DatasetIterator):
        self._held = [iterator]
        weakref.finalize(self, _close, self._held)

    def __next__(self) -> Batch:
        return next(self._held[0])


def _close(held: list[grain.DatasetIterator]) -> None:
    held.pop().close()


_PADDING = (np.empty(0, np.uint16), (-1, -1))


class _Sequences:
    """The sequences of a stream by number, for grain."""

    def __init__(self, source: int, stream: TokenStream, length: int):
        self._source, self._stream, self._length = source, stream, length
        self._count = packing.count(len(stream), length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, sequence: int) -> tuple[np.ndarray, tuple[int, int]]:
        window = packing.window(sequence, self._length, len(self._stream))
        return self._stream.read(*window), (self._source, sequence)

    def shuffled(self, i: int) -> tuple[np.ndarray, tuple[int, int]]:
        """Sequence i of a fixed permutation."""
        return self[grain.experimental.index_shuffle(i, max_index=self._count - 1, seed=0, rounds=4)]


def _check_count(source: str, cache: Documents, count: int) -> None:
    if not count:
        raise UserError(
            f'Source {source} has no documents to train on '
            f'({cache.empty} empty ones were skipped, {cache.documents["heldout"]} are held out).'
        )
    if count >= 2**32:
        raise UserError(f'Source {source} has {count} sequences, the shuffle reaches 2^32: give it as several sources.')
