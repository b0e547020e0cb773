"""Batches of comparisons for reward models (paper p10-12; recipe E): batch k is a function of (seed, k, mixture) alone.

A batch has so many pairs, and those of one prompt are all in one. The answers of a prompt lie in one row, each once, after its
own copy of the prompt and in a segment of its own, beside those of other prompts. So one forward pass reads them all, each once
however many it is compared with (as InstructGPT's), and little of it is padding. Batches have as many rows as the fullest needs.

Comparisons are tokenised at start and kept in memory, by every process alike, as dialogs are (`data/dialogs.py`).
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Annotated

import numpy as np
from tqdm import tqdm

from llama2_jax.config import Config, Names, UserError, between
from llama2_jax.data.comparisons import JOINS, RATINGS, Comparison, to_comparisons
from llama2_jax.data.dialogs import TOO_LONG, held_out, shuffled
from llama2_jax.data.mixing import Component, Interleave, amounts, parse_mixture, source_seed
from llama2_jax.data.packing import best_fit
from llama2_jax.data.schemas import joined
from llama2_jax.data.sources import Tally, read_records, skipped
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
      epochs: of the run; the paper found that more than one over-fits (p12).
      heldout: share of each source that is never trained on; what begins with the same question stays together.
    """

    mixture: Annotated[str, Names('mixture', 'comparisons')] = 'toy:preferences'
    epochs: float = between(1.0, 1e-6)
    heldout: float = between(0.02, 0, 0.999)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A comparison as token ids, and where it comes from."""

    where: str
    ids: tuple[np.ndarray, np.ndarray]  # prompt and chosen answer, prompt and rejected answer, each with its EOS
    rating: int
    safe: tuple[int, int]
    turns: int


class Bundle:
    """What lies together in a row: some pairs, and each of their answers once."""

    def __init__(self, pairs: Sequence[Pair]):
        found = {ids.tobytes(): ids for pair in pairs for ids in pair.ids}
        place = {key: i for i, key in enumerate(found)}
        self.pairs, self.answers = pairs, list(found.values())
        self.sides = [[place[ids.tobytes()] for ids in pair.ids] for pair in pairs]
        self.tokens = sum(map(len, self.answers))


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
    records: list[list[Pair]] = dataclasses.field(default_factory=list)
    heldout: list[list[Pair]] = dataclasses.field(default_factory=list)
    tally: Tally = dataclasses.field(default_factory=Tally)
    weight: float = 0.0

    def __str__(self) -> str:
        pairs = [pair for record in self.records for pair in record]
        tokens = np.mean([len(ids) for pair in pairs for ids in pair.ids])
        rated = np.mean([pair.rating != UNRATED for pair in pairs])
        counts = f'{self.weight:>8.4f} {len(pairs):>9,} {tokens:>13.1f} {rated:>7.1%}'
        left = f'{self.tally.cut:>6,} {sum(map(len, self.heldout)):>8,}  {self.tally}'
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
      process_index, process_count: process p yields rows [p * r, (p + 1) * r) of each batch's rows.

    Attributes:
      sources: `PreferenceSource` of each source of the mixture.
      rows: R, of a batch.
      slots: S, pairs that a row may hold.
      steps: batches in the run.

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
        process_index: int = 0,
        process_count: int = 1,
    ):
        self._length, self._batch_size = length, batch_size
        self._index, self._count = process_index, process_count
        components = parse_mixture(config.mixture)
        room = min(length // 2, context)
        self.sources = [_read(c, tokenizer, room, config.heldout, quiet=process_index > 0) for c in components]
        self._run = self._plan(components, Fraction(str(config.epochs)), seed)
        run = (self.sources[source].records[number] for source, number in self._run)
        self._batches = [self._pack(batch) for batch in self._fill(run)]
        self.steps = len(self._batches)
        self._heldout = [[self._pack(batch) for batch in self._fill(source.heldout)] for source in self.sources]
        self._shards = shards
        self.rows, self.slots = self._shape(self._batches)

    def _shape(self, batches: list[list[list[Bundle]]]) -> tuple[int, int]:
        """Rows of a batch, and pairs in a row, that hold each of these."""
        rows = max(map(len, batches))
        slots = max(sum(len(bundle.pairs) for bundle in row) for batch in batches for row in batch)
        return -(-rows // self._shards) * self._shards, slots

    def _plan(self, components: tuple[Component, ...], epochs: Fraction, seed: int) -> list[tuple[int, int]]:
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
        plan = []
        for row in range(total):
            source, number = order[row]
            epoch, i = divmod(number, counts[source])
            plan.append((source, shuffled(i, counts[source], seeds[source] + epoch)))
        return plan

    def _fill(self, records: Iterable[list[Pair]]) -> Iterator[list[list[Pair]]]:
        """The records of each batch: as many whole ones as have room in it."""
        batch, pairs = [], 0
        for record in records:
            if len(record) > self._batch_size:
                raise UserError(
                    f'{record[0].where} makes {len(record)} pairs, which must stay in one batch; batch_size={self._batch_size}.'
                )
            if pairs + len(record) > self._batch_size:
                yield batch
                batch, pairs = [], 0
            batch.append(record)
            pairs += len(record)
        if batch:
            yield batch

    def _pack(self, records: list[list[Pair]]) -> list[list[Bundle]]:
        """The bundles of each row; a record that is too long for one falls into its pairs."""
        bundles = []
        for record in records:
            whole = Bundle(record)
            bundles += [whole] if whole.tokens <= self._length else [Bundle([pair]) for pair in record]
        rows = best_fit(np.array([bundle.tokens for bundle in bundles]), self._length)
        return [[bundles[i] for i in row] for row in rows]

    def train(self, start_step: int = 0) -> Iterator[Batch]:
        """Batches start_step, start_step + 1, … steps - 1, this process's rows; starting late costs nothing.

        Each is a dict: tokens, segment_ids int32 [r, L]; last int32 [r, S, 2], where chosen and rejected answer of each pair
        end; rating int32 [r, S] (UNRATED, or 1 + its place in RATINGS); safe int32 [r, S, 2] (1, 0 or UNKNOWN); weights float32
        [r, S], 0 where a row has no such pair; and record_ids int64 [1], the step.
        """
        for step in range(start_step, self.steps):
            yield self._collate(self._batches[step], self.rows, self.slots) | {'record_ids': np.array([step])}

    def heldout(self, source: int) -> Iterator[Batch]:
        """The held-out pairs of a source once, as batches like those of `train`, perhaps with another number of rows."""
        if self._heldout[source]:
            rows, slots = self._shape([batch for batches in self._heldout for batch in batches])
            for batch in self._heldout[source]:
                yield self._collate(batch, rows, slots)

    def describe(self, record_ids: np.ndarray) -> list[str]:
        """The places of the pairs of a batch."""
        return [pair.where for row in self._batches[int(record_ids[0])] for bundle in row for pair in bundle.pairs]

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
        for r, row in enumerate(packed[i] if i < len(packed) else [] for i in mine):
            at = segment = slot = 0
            for bundle in row:
                ends = []
                for ids in bundle.answers:
                    here, segment = slice(at, at + len(ids)), segment + 1
                    tokens[r, here], segment_ids[r, here] = ids, segment
                    at += len(ids)
                    ends.append(at - 1)
                for pair, sides in zip(bundle.pairs, bundle.sides, strict=True):
                    last[r, slot] = [ends[side] for side in sides]
                    rating[r, slot], safe[r, slot], weights[r, slot] = pair.rating, pair.safe, 1
                    slot += 1
        return {
            'tokens': tokens, 'segment_ids': segment_ids, 'last': last, 'rating': rating, 'safe': safe, 'weights': weights,
        }  # fmt: skip


def _read(component: Component, tokenizer, room: int, share: float, quiet: bool) -> PreferenceSource:
    """The pairs of a source, with a progress bar unless `quiet`; an answer has `room` tokens with its prompt.

    Raises:
      UserError: naming file and row.
    """
    found, before = PreferenceSource(component.source, tally=Tally(component.skip)), None
    records = joined(read_records(component.source), JOINS)
    title = f'reading {component.source}'
    for row in tqdm(records, desc=title, unit=' rows', leave=False, dynamic_ncols=True, disable=quiet):
        try:
            comparisons, dropped = to_comparisons(row)
        except UserError as error:
            found.tally.refuse(error)
            continue
        found.tally.dropped.update(dropped)
        record = []
        for comparison in comparisons:
            pair, reason = encode(comparison, tokenizer, room, row.where)
            found.tally.cut += reason == CUT
            if pair is None:
                found.tally.dropped[reason] += 1
            else:
                record.append(pair)
        if not record:
            continue
        prompt = comparisons[0].prompt
        home = found.heldout if held_out(prompt, share) else found.records
        if prompt == before and len(home[-1]) + len(record) <= JOINED:
            home[-1] += record
        else:
            home.append(record)
        before = prompt
    return found


CUT, EQUAL = 'cut', 'equal as tokens'


def encode(comparison: Comparison, tokenizer, room: int, where: str) -> tuple[Pair | None, str]:
    """The ids of both answers after the prompt, and CUT where it lost its oldest turns for length.

    None where not even the last turn fits, or where both answers are the same tokens; then why: TOO_LONG or EQUAL.
    """
    prompt, cut = comparison.prompt, ''
    while True:
        ids = tuple(
            np.array(encode_dialog([*prompt, *answer], tokenizer, where)[0], np.uint32)
            for answer in (comparison.chosen, comparison.rejected)
        )
        if np.array_equal(*ids):
            return None, EQUAL
        if max(map(len, ids)) <= room:
            rating = UNRATED if comparison.rating is None else 1 + RATINGS.index(comparison.rating)
            safe = tuple(UNKNOWN if safe is None else int(safe) for safe in comparison.safe)
            return Pair(where, ids, rating, safe, comparison.turns), cut
        system = prompt[0]['role'] == 'system'
        if len(prompt) - system <= 1:
            return None, TOO_LONG
        prompt, cut = [*prompt[:system], *prompt[system + 2 :]], CUT
