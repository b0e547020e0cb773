"""Batches of comparisons for reward models (paper p10-12; recipe E): batch k is a function of (seed, k, mixture) alone.

A batch has so many pairs, and those of one prompt are all in one. The answers of a prompt lie in one row, each once, after its
own copy of the prompt and in a segment of its own, beside those of other prompts. So one forward pass reads them all, each once
however many it is compared with (as InstructGPT's), and little of it is padding. Batches have as many rows as the fullest needs.

Comparisons are tokenised once (`data/rows.py`); of each pair memory holds a few numbers, and tokens are read with the batch.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Annotated, Any

import numpy as np

from llama2_jax.config import Config, Names, UserError, between
from llama2_jax.data.cache import ANY
from llama2_jax.data.comparisons import JOINS, RATINGS, Comparison, to_comparisons
from llama2_jax.data.dialogs import TOO_LONG, question, shuffled
from llama2_jax.data.mixing import Component, Interleave, amounts, parse_mixture, source_seed
from llama2_jax.data.packing import best_fit
from llama2_jax.data.rows import Barrier, RowEncoder, Stream, as_bytes, read_columns, starts
from llama2_jax.data.sources import Tally, skipped
from llama2_jax.data.tokenise import Chunk, Encoded, token_dtype
from llama2_jax.text.dialog import encode_dialog

Batch = dict[str, np.ndarray]
UNRATED = 0  # ratings are 1 + their place in RATINGS
JOINED = 16  # pairs, at most, of rows that follow each other and have one prompt: they are a record too
UNKNOWN = -1  # whether an answer is safe: 1, 0, or this


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(Config):
    """What to learn from.

    Attributes:
      mixture: `source[ + source…][:amount][@epochs], …` (`data/mixing.py`): each record comes once an epoch; `:0.1` is a share of
        the run's records. So `a, b:0.5` is all of a with as much of b, and `a + b:0.9, c:0.1` ends when one entry is through.
      epochs: Epochs of the run; the paper found that more than one over-fits (p12).
      heldout: Share of each source held out; comparisons with the same first question stay together.
    """

    mixture: Annotated[str, Names('mixture', 'comparisons')] = 'toy:preferences'
    epochs: float = between(1.0, 1e-6)
    heldout: float = between(0.02, 0, 0.999)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A comparison as token ids, and where it comes from."""

    where: str
    ids: tuple[np.ndarray, np.ndarray]  # prompt and chosen answer, prompt and rejected answer, each with its EOS
    answers: tuple[np.ndarray, np.ndarray]  # of each of these ids, whether it belongs to the answer
    rating: int
    safe: tuple[int, int]
    turns: int


_PAIR = np.dtype(
    [
        ('lengths', '<i4', (2,)), ('answers', '<u8', (2,)), ('prompt', '<u8'), ('fate', '<u8'), ('row', '<i4'), ('turns', '<i4'),
        ('place', '<i4'), ('rating', '|i1'), ('safe', '|i1', (2,)),
    ]
)  # fmt: skip
"""A pair in a column: tokens and hash of each answer with its prompt; hashes of the prompt and of its first question; pairs of
its row, if it is the first of them; length of the name of its place."""


class Table:
    """The pairs of a source: their numbers in memory, their tokens where they lie."""

    def __init__(self, columns: dict[str, Stream]):
        self._columns = columns
        self.pairs = columns['pairs'].read(0, len(columns['pairs']))
        self._tokens = starts(self.pairs['lengths'].reshape(-1))
        self._places = starts(self.pairs['place'])

    def ids(self, answer: int) -> np.ndarray:
        """The tokens of an answer: 2 * pair is the chosen one, 2 * pair + 1 the rejected one."""
        return self._read('tokens', answer).astype(np.uint32)

    def answer(self, answer: int) -> np.ndarray:
        """Whether each of these tokens belongs to the answer and not to its prompt."""
        return self._read('answers', answer).astype(bool)

    def _read(self, column: str, answer: int) -> np.ndarray:
        return self._columns[column].read(int(self._tokens[answer]), int(self._tokens[answer + 1]))

    def where(self, pair: int) -> str:
        """The place of the row of a pair."""
        return self._columns['places'].read(int(self._places[pair]), int(self._places[pair + 1])).tobytes().decode()

    def __getitem__(self, number: int) -> Pair:
        pair = self.pairs[number]
        ids, answers = ((read(2 * number), read(2 * number + 1)) for read in (self.ids, self.answer))
        return Pair(self.where(number), ids, answers, int(pair['rating']), tuple(pair['safe'].tolist()), int(pair['turns']))


class Records(Sequence[list[Pair]]):
    """Records of a table: each the pairs of one prompt. A list of pairs is made when it is asked for."""

    def __init__(self, table: Table, ranges: np.ndarray):
        self.table, self.ranges = table, ranges

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, number: int) -> list[Pair]:
        first, stop = self.ranges[number].tolist()
        return [self.table[pair] for pair in range(first, stop)]

    @property
    def pairs(self) -> np.ndarray:
        """The numbers of all pairs, end to end."""
        inside = np.zeros(len(self.table.pairs) + 1, np.int64)
        np.add.at(inside, self.ranges[:, 0], 1)
        np.add.at(inside, self.ranges[:, 1], -1)
        return self.table.pairs[np.cumsum(inside[:-1]) > 0]


class Bundle:
    """What lies together in a row: some pairs of a table, and each of their answers once."""

    def __init__(self, table: Table, first: int, stop: int):
        mine = table.pairs[first:stop]
        lengths = mine['lengths'].reshape(-1).tolist()
        found: dict[int, int] = {}
        self.table, self.pairs = table, range(first, stop)
        self.answers: list[int] = []
        self.sides, self.tokens = [], 0
        for i, key in enumerate(mine['answers'].reshape(-1).tolist()):
            if key not in found:
                found[key] = len(found)
                self.answers.append(2 * first + i)
                self.tokens += lengths[i]
            self.sides.append(found[key])


@dataclasses.dataclass
class PreferenceSource:
    """One source as the run uses it.

    Attributes:
      records: to train on, each the pairs of one prompt: of a row, or of rows that follow each other.
      heldout: those that are not.
      tally: how many comparisons were left out, by reason, and how many prompts lost their oldest turns for length.
      weight: share of the run's records.
    """

    name: str
    records: Records
    heldout: Records
    tally: Tally
    weight: float = 0.0

    def __str__(self) -> str:
        pairs = self.records.pairs
        tokens, rated = pairs['lengths'].mean(), (pairs['rating'] != UNRATED).mean()
        counts = f'{self.weight:>8.4f} {len(pairs):>9,} {tokens:>13.1f} {rated:>7.1%}'
        left = f'{self.tally.cut:>6,} {len(self.heldout.pairs):>8,}  {self.tally}'
        return f'{self.name:<40} {counts} {left}'.rstrip()


class PreferenceData:
    """Batches of a mixture of comparisons for one process of a run.

    Args:
      tokenizer: a `llama2_jax.text.tokenizer.Tokenizer`.
      length: L, tokens in a row.
      context: the most that an answer may have with its prompt.
      batch_size: pairs in the batch of all processes together.
      seed: any integer.
      shards: the number of rows of a batch is a multiple of it.
      answers: batches have `answer` and `numbers`, too.
      process_index, process_count: process p yields rows [p * r, (p + 1) * r) of each batch's rows.

    Attributes:
      sources: `PreferenceSource` of each source of the mixture.
      rows: R, of a batch.
      slots: S, pairs that a row may hold.
      steps: batches in the run.
      count: pairs of all sources, held-out ones included.

    Raises:
      UserError: for anything wrong with the mixture, its sources or the batch size.
    """

    def __init__(
        self,
        config: PreferenceConfig,
        tokenizer,
        *,
        length: int,
        context: int,
        batch_size: int,
        seed: int,
        shards: int = 1,
        answers: bool = False,
        process_index: int = 0,
        process_count: int = 1,
        barrier: Barrier = lambda name: None,
    ):
        self._length, self._batch_size, self._answers = length, batch_size, answers
        self._index, self._count = process_index, process_count
        components = parse_mixture(config.mixture)
        room = min(length // 2, context)
        place = {'process_index': process_index, 'process_count': process_count, 'barrier': barrier}
        self.sources = [_read(c, tokenizer, room, config.heldout, **place) for c in components]
        self._first = starts(np.array([len(source.records.table.pairs) for source in self.sources]))
        self.count = int(self._first[-1])
        self._run = self._fill(self._plan(components, Fraction(str(config.epochs)), seed))
        self.steps = len(self._run)
        self._heldout = [
            self._fill([(i, number) for number in range(len(source.heldout))], heldout=True)
            for i, source in enumerate(self.sources)
        ]
        self._shards = shards
        self.rows, self.slots = self._shape(map(self._pack, self._run))

    def _shape(self, batches: Iterable[list[list[Bundle]]]) -> tuple[int, int]:
        """Rows of a batch, and pairs in a row, that hold each of these."""
        rows = slots = 0
        for batch in batches:
            rows, slots = max(rows, len(batch)), max(slots, *(sum(len(bundle.pairs) for bundle in row) for row in batch))
        return -(-rows // self._shards) * self._shards, slots

    def _plan(self, components: tuple[Component, ...], epochs: Fraction, seed: int) -> Iterator[tuple[int, int]]:
        """The (source, record) of the run in order, by the weights."""
        counts = [len(source.records) for source in self.sources]
        for source, count in zip(self.sources, counts, strict=True):
            if not count:
                left = str(source.tally) or 'no rows'
                raise UserError(f'Source {source.name} has no comparisons to train on ({left}; {len(source.heldout)} held out).')
        taken = amounts(components, counts, epochs)
        total, shares = int(sum(taken)), [amount / sum(taken) for amount in taken]
        for source, share in zip(self.sources, shares, strict=True):
            source.weight = float(share)
        order, seeds = Interleave(shares, total), [source_seed(seed, c.source) for c in components]
        for row in range(total):
            source, number = order[row]
            epoch, i = divmod(number, counts[source])
            yield source, shuffled(i, counts[source], seeds[source] + epoch)

    def _fill(self, records: Iterable[tuple[int, int]], heldout: bool = False) -> list[np.ndarray]:
        """The (source, first pair, end) of the records of each batch: as many whole ones as have room in it."""
        ranges = [(source.heldout if heldout else source.records).ranges.tolist() for source in self.sources]
        batches, batch, pairs = [], [], 0
        for source, number in records:
            first, stop = ranges[source][number]
            if stop - first > self._batch_size:
                where = self.sources[source].records.table.where(first)
                raise UserError(
                    f'{where} makes {stop - first} pairs, which must stay in one batch; batch_size={self._batch_size}.'
                )
            if pairs + stop - first > self._batch_size:
                batches.append(np.array(batch))
                batch, pairs = [], 0
            batch.append((source, first, stop))
            pairs += stop - first
        return [*batches, np.array(batch)] if batch else batches

    def _pack(self, records: np.ndarray) -> list[list[Bundle]]:
        """The bundles of each row; a record that is too long for one falls into its pairs."""
        bundles = []
        for source, first, stop in records.tolist():
            table = self.sources[source].records.table
            whole = Bundle(table, first, stop)
            bundles += [whole] if whole.tokens <= self._length else [Bundle(table, i, i + 1) for i in range(first, stop)]
        rows = best_fit(np.array([bundle.tokens for bundle in bundles]), self._length)
        return [[bundles[i] for i in row] for row in rows]

    def train(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, … steps - 1, this process's rows; starting late costs nothing.

        Each is a dict: tokens, segment_ids int32 [r, L]; last int32 [r, S, 2], where chosen and rejected answer of each pair
        end; rating int32 [r, S] (UNRATED, or 1 + its place in RATINGS); safe int32 [r, S, 2] (1, 0 or UNKNOWN); weights float32
        [r, S], 0 where a row has no such pair; and record_ids int64 [1], the step. With `answers` also answer bool [r, L], the
        tokens of answers; and numbers int32 [r, S], which of the `count` pairs each is, or -1.
        """
        for step in range(start_step, self.steps):
            yield self._collate(self._pack(self._run[step]), self.rows, self.slots) | {'record_ids': np.array([step])}

    def heldout(self, source: int) -> Iterator[Batch]:
        """The held-out pairs of a source once, as batches like those of `train`, perhaps with another number of rows."""
        if self._heldout[source]:
            rows, slots = self._shape(self._pack(batch) for batches in self._heldout for batch in batches)
            for batch in self._heldout[source]:
                yield self._collate(self._pack(batch), rows, slots)

    def describe(self, record_ids: np.ndarray) -> list[str]:
        """The places of the pairs of a batch."""
        rows = self._pack(self._run[int(record_ids[0])])
        return [bundle.table.where(pair) for row in rows for bundle in row for pair in bundle.pairs]

    def table(self) -> str:
        """The sources as a table to print."""
        head = f'{"source":<40} {"weight":>8} {"pairs":>9} {"tokens/answer":>13} {"rated":>7}'
        return '\n'.join([f'{head} {"cut":>6} {"held out":>8}  left out', *(str(source) for source in self.sources)]) + skipped(
            [line for source in self.sources for line in source.tally.bad]
        )

    def _collate(self, packed: list[list[Bundle]], rows: int, slots: int) -> Batch:
        share = rows // self._count
        mine = range(self._index * share, (self._index + 1) * share)
        tokens, segment_ids = (np.zeros((share, self._length), np.int32) for _ in range(2))
        last, safe = np.zeros((share, slots, 2), np.int32), np.full((share, slots, 2), UNKNOWN, np.int32)
        rating, weights = np.zeros((share, slots), np.int32), np.zeros((share, slots), np.float32)
        answer, numbers = np.zeros((share, self._length), bool), np.full((share, slots), -1, np.int32)
        offsets = {id(source.records.table): int(first) for source, first in zip(self.sources, self._first, strict=False)}
        for r, row in enumerate(packed[i] if i < len(packed) else [] for i in mine):
            at = segment = slot = 0
            for bundle in row:
                ends = []
                for number in bundle.answers:
                    ids = bundle.table.ids(number)
                    here, segment = slice(at, at + len(ids)), segment + 1
                    tokens[r, here], segment_ids[r, here] = ids, segment
                    if self._answers:
                        answer[r, here] = bundle.table.answer(number)
                    at += len(ids)
                    ends.append(at - 1)
                pairs, here = bundle.table.pairs[bundle.pairs.start : bundle.pairs.stop], slice(slot, slot + len(bundle.pairs))
                last[r, here] = np.array([ends[side] for side in bundle.sides]).reshape(-1, 2)
                rating[r, here], safe[r, here], weights[r, here] = pairs['rating'], pairs['safe'], 1
                numbers[r, here] = np.array(bundle.pairs) + offsets[id(bundle.table)]
                slot += len(bundle.pairs)
        return {
            'tokens': tokens, 'segment_ids': segment_ids, 'last': last, 'rating': rating, 'safe': safe, 'weights': weights,
        } | ({'answer': answer, 'numbers': numbers} if self._answers else {})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Encoder(RowEncoder):
    """Rows to columns; an answer has `room` tokens with its prompt."""

    tokenizer: Any
    room: int

    joins = JOINS

    @property
    def key(self) -> tuple:
        return 'comparisons', 2, self.tokenizer.fingerprint, self.room

    @property
    def columns(self) -> dict[str, np.dtype]:
        bytes_ = np.dtype('|u1')
        return {'tokens': token_dtype(self.tokenizer), 'answers': bytes_, 'pairs': _PAIR, 'places': bytes_}

    def __call__(self, chunk: Chunk) -> Encoded:
        tally, pairs, numbers = Tally(ANY), [], []
        for row in chunk.units:
            try:
                comparisons, dropped = to_comparisons(row)
                found = [encode(comparison, self.tokenizer, self.room, row.where) for comparison in comparisons]
            except UserError as error:
                tally.refuse(error)
                continue
            tally.dropped.update(dropped)
            tally.dropped.update(reason for pair, reason in found if pair is None)
            tally.cut += sum(reason == CUT for _, reason in found)
            kept = [pair for pair, _ in found if pair is not None]
            for i, pair in enumerate(kept):
                prompt = comparisons[0].prompt
                hashes = tuple(_hash(ids.tobytes()) for ids in pair.ids)
                both = _hash(repr(prompt).encode()), _hash(question(prompt).encode())
                facts = len(kept) * (i == 0), pair.turns, len(pair.where.encode()), pair.rating, pair.safe
                numbers.append((tuple(map(len, pair.ids)), hashes, *both, *facts))
            pairs += kept
        tokens = np.concatenate([np.empty(0, np.uint32), *(ids for pair in pairs for ids in pair.ids)])
        answers = np.concatenate([np.empty(0, np.uint8), *(mask for pair in pairs for mask in pair.answers)])
        places, _ = as_bytes([pair.where for pair in pairs])
        return Encoded(
            {'tokens': tokens, 'answers': answers.astype(np.uint8), 'pairs': np.array(numbers, _PAIR), 'places': places},
            tally=tally,
        )


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _read(component: Component, tokenizer, room: int, share: float, **place: Any) -> PreferenceSource:
    """The pairs of a source, tokenised by the processes of `place`; an answer has `room` tokens with its prompt.

    Raises:
      UserError: naming file and row.
    """
    tally = Tally(component.skip)
    table = Table(read_columns(component.source, _Encoder(tokenizer, room), tally, **place))
    first = np.flatnonzero(table.pairs['row'])
    ranges, before = [], None
    for start, count, prompt in zip(
        first.tolist(), table.pairs['row'][first].tolist(), table.pairs['prompt'][first].tolist(), strict=True
    ):
        if prompt == before and start + count - ranges[-1][0] <= JOINED:
            ranges[-1] = ranges[-1][0], start + count
        else:
            ranges.append((start, start + count))
        before = prompt
    ranges = np.array(ranges, np.int64).reshape(-1, 2)
    out = table.pairs['fate'][ranges[:, 0]] / 2**64 < share
    return PreferenceSource(component.source, Records(table, ranges[~out]), Records(table, ranges[out]), tally)


CUT, EQUAL = 'cut', 'equal as tokens'


def encode(comparison: Comparison, tokenizer, room: int, where: str) -> tuple[Pair | None, str]:
    """The ids of both answers after the prompt, and CUT where it lost its oldest turns for length.

    None where not even the last turn fits, or where both answers are the same tokens; then why: TOO_LONG or EQUAL.
    """
    prompt, cut = comparison.prompt, ''
    while True:
        before = [message | {'weight': 0} if message['role'] == 'assistant' else message for message in prompt]
        found = [encode_dialog([*before, *answer], tokenizer, where) for answer in (comparison.chosen, comparison.rejected)]
        ids = np.array(found[0][0], np.uint32), np.array(found[1][0], np.uint32)
        if np.array_equal(*ids):
            return None, EQUAL
        if max(map(len, ids)) <= room:
            rating = UNRATED if comparison.rating is None else 1 + RATINGS.index(comparison.rating)
            safe = tuple(UNKNOWN if safe is None else int(safe) for safe in comparison.safe)
            return Pair(where, ids, (np.array(found[0][1]), np.array(found[1][1])), rating, safe, comparison.turns), cut
        system = prompt[0]['role'] == 'system'
        if len(prompt) - system <= 1:
            return None, TOO_LONG
        prompt, cut = [*prompt[:system], *prompt[system + 2 :]], CUT
