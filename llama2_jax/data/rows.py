"""Dialogs and comparisons as tokens: a small source is tokenised at start and held in memory, a large one has a token cache."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from llama2_jax.data import sources, tokenise
from llama2_jax.data.cache import Cache
from llama2_jax.data.files import Position
from llama2_jax.data.schemas import Join, joined
from llama2_jax.data.sources import Part, Record, Tally
from llama2_jax.data.tokenise import Chunk, Encoder

Barrier = Callable[[str], None]


class RowEncoder:
    """Reads the rows of a part; its children turn chunks of them into columns (`tokenise.Encoder`).

    Attributes:
      joins: Rows that belong together.
    """

    by_content = True
    joins: Sequence[Join] = ()

    def read(self, part: Part, start: Position) -> Iterator[tuple[Record, int, Position | None]]:
        """Rows of a part with their sizes and the positions after them."""
        for record in joined(part.records(start), self.joins):
            yield record, size_of(record.value), record.end


class Stream(Protocol):
    """A column, in memory or on disk."""

    def __len__(self) -> int:
        """Number of items."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Items [start, stop)."""


class _InMemory:
    def __init__(self, items: np.ndarray):
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._items[start:stop]


def read_columns(
    source: str,
    encoder: Encoder,
    tally: Tally,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Barrier = lambda name: None,
) -> dict[str, Stream]:
    """The columns that an encoder makes of the rows of a source; `tally` counts what was left out.

    Raises:
      UserError: for a source that cannot be read, or more bad rows than `tally` allows, naming file and row.
    """
    if (few := _few(source, encoder)) is None:
        where = {'process_index': process_index, 'process_count': process_count, 'barrier': barrier}
        cache = Cache(tokenise.build(source, encoder, tokenise.default_root(), skip=tally.skip, **where))
        tally.add(cache.tally)
        return dict(cache.streams) | {'cache': cache}
    found = [encoder(chunk) for chunk in few]
    for encoded in found:
        tally.add(encoded.tally)
    return {name: _InMemory(np.concatenate([e.columns[name] for e in found])) for name in found[0].columns}


def _few(source: str, encoder: Encoder) -> list[Chunk] | None:
    """All chunks of a small source, None for a larger one; what is generated has no cache."""
    parts = sources.split(source)
    chunks = itertools.chain.from_iterable(tokenise.cut(i, part, encoder) for i, part in enumerate(parts))
    few, size = [], 0
    for chunk in chunks:
        few.append(chunk)
        size += chunk.size
        if size > tokenise.FEW * tokenise.CHUNK and parts[0].kind != 'toy':
            return None
    return few


def size_of(value) -> int:
    """Bytes of a row, or about as many."""
    return len(value) if isinstance(value, bytes) else len(repr(value))


def as_bytes(places: list[str]) -> tuple[np.ndarray, list[int]]:
    """Texts end to end as an array, and the length of each."""
    found = [place.encode() for place in places]
    return np.frombuffer(b''.join(found), np.uint8), [len(place) for place in found]


def starts(lengths: np.ndarray) -> np.ndarray:
    """Where things of these lengths begin that lie end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
