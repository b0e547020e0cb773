"""Batches of dialogs to fine-tune on (paper p9): whole dialogs packed into rows, batch k a function of (seed, k, mixture) alone.

Dialogs are tokenised as comparisons are (`data/rows.py`). Each source is packed once; each epoch shuffles its rows. A row of the
run is found by arithmetic, as in `data/pretrain.py`, so a run may start at any step and on any number of hosts.

`data/mixing.py` says what amounts mean; a share is of the run's rows.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Annotated, Any

import grain
import numpy as np

from llama2_jax.config import Config, Names, UserError, between
from llama2_jax.data.cache import ANY
from llama2_jax.data.mixing import Interleave, amounts, parse_mixture, source_seed
from llama2_jax.data.packing import best_fit
from llama2_jax.data.rows import Barrier, RowEncoder, Stream, as_bytes, read_columns, starts
from llama2_jax.data.schemas import TREES, Dialog, to_dialog
from llama2_jax.data.sources import Tally, skipped
from llama2_jax.data.tokenise import Chunk, Encoded, token_dtype
from llama2_jax.text.dialog import cut_dialog, encode_dialog

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DialogConfig(Config):
    """What to fine-tune on.

    Attributes:
      mixture: `source[ + source…][:amount][@epochs], …` (`data/mixing.py`): each dialog comes once an epoch; `:2x` twice, `:0.5x`
        in every second epoch; `:0.1` a share of the run's rows; `@epochs` limits how often a dialog comes in the run.
      epochs: Epochs of the run; the paper's two.
      heldout: Share of each source's dialogs held out; dialogs with the same first question stay together.
    """

    mixture: Annotated[str, Names('mixture', 'dialogs')] = 'toy:dialogs'
    epochs: float = between(2.0, 1e-6)
    heldout: float = between(0.01, 0, 0.999)


@dataclasses.dataclass(frozen=True)
class DialogInfo:
    """One source as the run uses it.

    Attributes:
      name, weight: `weight` is the share of the run's rows.
      dialogs, rows, tokens: to train on, in one epoch; padding is no token.
      trained_share: of the tokens, those of answers.
      padding_share: of the places in the rows.
      cut: dialogs that lost their last turns for length.
      dropped: how many were left out, and `reasons` why.
      epochs: how often the run sees each dialog.
      heldout_tokens, heldout_bytes: of the answers held out.
    """

    name: str
    weight: float
    dialogs: int
    rows: int
    tokens: int
    trained_share: float
    padding_share: float
    cut: int
    dropped: int
    epochs: float
    heldout_tokens: int
    heldout_bytes: int
    reasons: str = ''

    def __str__(self) -> str:
        counts = f'{self.dialogs:>9,} {self.tokens:>12,} {self.trained_share:>8.1%} {self.padding_share:>8.1%}'
        left = f'{self.cut:>6,} {self.dropped:>8,} {self.epochs:>7.2f} {self.heldout_tokens:>16,}'
        return f'{self.name:<40} {self.weight:>8.4f} {counts} {left}  {self.reasons}'.rstrip()


class DialogData:
    """Batches of a mixture of dialogs for one process of a run.

    Args:
      tokenizer: a `llama2_jax.text.tokenizer.Tokenizer`.
      length: L, targets in a row.
      batch_size: B, rows in the batch of all processes together.
      seed: any integer.
      process_index, process_count: process p yields rows [p * b, (p + 1) * b) of each batch, b = B / process_count.

    Attributes:
      sources: `DialogInfo` of each source of the mixture.
      steps: batches in the run; the last one is filled up with empty rows.

    Raises:
      UserError: for anything wrong with the mixture, its sources or the batch size.
    """

    def __init__(
        self,
        config: DialogConfig,
        tokenizer,
        *,
        length: int,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        barrier: Barrier = lambda name: None,
    ):
        if batch_size % process_count:
            raise UserError(f'A batch of {batch_size} rows cannot be divided among {process_count} processes.')
        self._length, self._batch_size, self._rows = length, batch_size, batch_size // process_count
        self._index = process_index
        components = parse_mixture(config.mixture)
        self._train, self._heldout = [], []
        place = {'process_index': process_index, 'process_count': process_count, 'barrier': barrier}
        for component in components:
            train, heldout = _read(component.source, tokenizer, length + 1, config.heldout, component.skip, **place)
            if not len(train):
                raise UserError(
                    f'Source {component.source} has no dialogs to train on, for length={length} '
                    f'({str(train.tally) or "no rows"}; {len(heldout)} held out).'
                )
            self._train.append(train)
            self._heldout.append(heldout)
        taken = amounts(components, [len(train.rows) for train in self._train], Fraction(str(config.epochs)))
        counts = [max(1, int(amount)) for amount in taken]
        self._total = sum(counts)
        self._order = Interleave([Fraction(count, self._total) for count in counts], self._total)
        self._seeds = [source_seed(seed, component.source) for component in components]
        self.steps = -(-self._total // batch_size)
        self.sources = [
            train.info(component.source, count / self._total, float(amount / len(train.rows)), heldout)
            for component, count, amount, train, heldout in zip(
                components, counts, taken, self._train, self._heldout, strict=True
            )
        ]

    def train(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, … steps - 1, this process's rows; starting late costs nothing.

        Each is a dict: tokens, segment_ids int32 and trained bool, all [b, L+1], and record_ids int64 [b, 2] (source, row).
        Segments 1, 2, 3… are the dialogs of a row from the left, 0 is padding, which is known by lengths and no token's value.
        An empty row has record_ids -1. Position j + 1 of the row is the target of position j, to be learned if `trained`; the
        first token of a dialog never is.
        """
        for step in range(start_step, self.steps):
            first = step * self._batch_size + self._index * self._rows
            yield self._collate(self._train, [self._find(row) for row in range(first, first + self._rows)])

    def heldout(self, source: int) -> Iterator[Batch]:
        """The held-out dialogs of a source once, as batches like those of `train`; the same number on every process."""
        rows = len(self._heldout[source].rows)
        for first in range(0, rows, self._batch_size):
            mine = range(first + self._index * self._rows, first + (self._index + 1) * self._rows)
            places = [(source, shuffled(i, rows, 0)) if i < rows else _EMPTY for i in mine]
            yield self._collate(self._heldout, places)

    def describe(self, record_ids: np.ndarray) -> list[str]:
        """Rows of `record_ids` of `train` for people, such as 'row 17 of jsonl:a.jsonl (a.jsonl:3, a.jsonl:90)'."""
        names = []
        for source, row in np.asarray(record_ids).tolist():
            if source < 0:
                names.append('an empty row')
                continue
            train = self._train[source]
            names.append(f'row {row} of {self.sources[source].name} ({", ".join(map(train.where, train.rows[row]))})')
        return names

    def table(self) -> str:
        """The sources as a table to print."""
        head = f'{"source":<40} {"weight":>8} {"dialogs":>9} {"tokens":>12} {"trained":>8} {"padding":>8}'
        head = f'{head} {"cut":>6} {"dropped":>8} {"epochs":>7} {"held-out tokens":>16}  reasons'
        bad = [line for train in self._train for line in train.tally.bad]
        return '\n'.join([head, *map(str, self.sources)]) + skipped(bad)

    def _find(self, row: int) -> tuple[int, int]:
        """Row of the run -> source and row of that source."""
        if row >= self._total:
            return _EMPTY
        source, number = self._order[row]
        count = len(self._train[source].rows)
        epoch, i = divmod(number, count)
        return source, shuffled(i, count, self._seeds[source] + epoch)

    def _collate(self, stores: Sequence['_Packed'], places: list[tuple[int, int]]) -> Batch:
        shape = (len(places), self._length + 1)
        tokens, segment_ids, trained = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
        for b, (source, row) in enumerate(places):
            at = 0
            for segment, (ids, learned) in enumerate(stores[source].dialogs(row) if source >= 0 else (), 1):
                here = slice(at, at + len(ids))
                tokens[b, here], segment_ids[b, here], trained[b, here] = ids, segment, learned
                at += len(ids)
        return {'tokens': tokens, 'segment_ids': segment_ids, 'trained': trained, 'record_ids': np.array(places, np.int64)}


_EMPTY = (-1, -1)
TOO_LONG = 'too long'


_DIALOG = np.dtype([('length', '<i4'), ('trained', '<i4'), ('bytes', '<i4'), ('place', '<i4'), ('fate', '<u8')])
"""A dialog in a column: numbers of its tokens, of those trained, of its trained answers' bytes and of the bytes of its place; a
hash of its first question."""


class _Packed:
    """Some dialogs of a source and the rows that they are packed into: numbers in memory, tokens where they lie.

    Args:
      columns: Of the source, as `_Encoder` makes them.
      mine: Indices of the dialogs.
      room: Tokens of a row.
      tally: What became of the rows of the source.

    Attributes:
      rows: The dialogs of each row.
    """

    def __init__(self, columns: dict[str, Stream], mine: np.ndarray, room: int, tally: Tally):
        self.tally, self._columns, self._mine, self._room = tally, columns, mine.tolist(), room
        numbers = columns['dialogs'].read(0, len(columns['dialogs']))
        self._tokens, self._places = starts(numbers['length']), starts(numbers['place'])
        self.numbers = numbers[mine]
        self.rows = best_fit(self.numbers['length'].astype(np.int64), room)

    def __len__(self) -> int:
        return len(self._mine)

    def dialogs(self, row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The (ids, trained) of the dialogs of a row."""
        for i in self.rows[row]:
            here = self._tokens[self._mine[i] : self._mine[i] + 2].tolist()
            yield self._columns['tokens'].read(*here), self._columns['trained'].read(*here)

    def where(self, dialog: int) -> str:
        """The place of a dialog, 'a.jsonl:17'."""
        here = self._places[self._mine[dialog] : self._mine[dialog] + 2].tolist()
        return self._columns['places'].read(*here).tobytes().decode()

    def info(self, name: str, weight: float, epochs: float, heldout: '_Packed') -> DialogInfo:
        tokens = int(self.numbers['length'].sum(dtype=np.int64))
        return DialogInfo(
            name=name,
            weight=weight,
            dialogs=len(self),
            rows=len(self.rows),
            tokens=tokens,
            trained_share=float(self.numbers['trained'].sum(dtype=np.int64)) / tokens,
            padding_share=1 - tokens / (len(self.rows) * self._room),
            cut=self.tally.cut,
            dropped=sum(self.tally.dropped.values()) + len(self.tally.bad),
            reasons=str(self.tally),
            epochs=epochs,
            heldout_tokens=int(heldout.numbers['trained'].sum(dtype=np.int64)),
            heldout_bytes=int(heldout.numbers['bytes'].sum(dtype=np.int64)),
        )


@dataclasses.dataclass(frozen=True)
class _Encoder(RowEncoder):
    """Rows to columns; a dialog of more than `room` tokens loses its last turns."""

    tokenizer: Any
    room: int

    joins = (TREES,)

    @property
    def key(self) -> tuple:
        return 'dialogs', 1, self.tokenizer.fingerprint, self.room

    @property
    def columns(self) -> dict[str, np.dtype]:
        names = {'tokens': token_dtype(self.tokenizer), 'trained': np.dtype('?')}
        return names | {'dialogs': _DIALOG, 'places': np.dtype('|u1')}

    def __call__(self, chunk: Chunk) -> Encoded:
        tally, tokens, learned, numbers, places = Tally(ANY), [], [], [], []
        for row in chunk.units:
            try:
                dialog, reason = to_dialog(row)
                if dialog and not any(map(is_trained, dialog)):
                    raise UserError(f'{row.where}: there is nothing to learn, every answer has weight 0.')
                ids, trained = encode_dialog(dialog, self.tokenizer, row.where) if dialog else ([], [])
            except UserError as error:
                tally.refuse(error)
                continue
            if dialog and len(ids) > self.room:
                dialog, reason = cut_dialog(dialog, self.tokenizer, self.room), TOO_LONG
                ids, trained = encode_dialog(dialog, self.tokenizer, row.where) if dialog else ([], [])
                tally.cut += any(trained)
            if not any(trained):
                tally.dropped[reason] += 1
                continue
            size = sum(len(message['content'].strip().encode()) for message in dialog if is_trained(message))
            numbers.append((len(ids), sum(trained), size, len(row.where.encode()), fate(dialog)))
            tokens.append(ids)
            learned.append(trained)
            places.append(row.where)
        columns = {
            'tokens': np.fromiter(itertools.chain.from_iterable(tokens), np.uint32),
            'trained': np.fromiter(itertools.chain.from_iterable(learned), bool),
            'dialogs': np.array(numbers, _DIALOG),
            'places': as_bytes(places)[0],
        }
        return Encoded(columns, tally=tally)


def _read(source: str, tokenizer, room: int, share: float, skip: int, **place: Any) -> tuple[_Packed, _Packed]:
    """The dialogs of a source, to train on and held out, in rows of `room` tokens; tokenised by the processes of `place`.

    Raises:
      UserError: naming file and row, also of a dialog in which nothing is to be learned.
    """
    tally = Tally(skip)
    columns = read_columns(source, _Encoder(tokenizer, room), tally, **place)
    out = columns['dialogs'].read(0, len(columns['dialogs']))['fate'] / 2**64 < share
    return _Packed(columns, np.flatnonzero(~out), room, tally), _Packed(columns, np.flatnonzero(out), room, Tally())


def is_trained(message: dict) -> bool:
    """Whether a message is an answer to learn."""
    return message['role'] == 'assistant' and message.get('weight', 1) == 1


def held_out(dialog: Dialog, share: float) -> bool:
    """By the first question: what is asked in held-out dialogs is not learned from other answers to the same."""
    return fate(dialog) / 2**64 < share


def fate(dialog: Dialog) -> int:
    """A hash of the first question, below 2^64."""
    return int.from_bytes(hashlib.blake2b(question(dialog).encode(), digest_size=8).digest())


def question(dialog: Dialog) -> str:
    """The first question of a dialog."""
    return next(message['content'] for message in dialog if message['role'] == 'user').strip()


def shuffled(i: int, count: int, seed: int) -> int:
    """Element i of a permutation of range(count)."""
    return grain.experimental.index_shuffle(i, max_index=count - 1, seed=seed % 2**32, rounds=4)
