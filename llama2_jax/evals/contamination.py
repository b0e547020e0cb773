"""Contamination of evaluation sets by training text (paper p75-76; recipe I.3).

A token of an evaluation sample is contaminated if it lies in a span of more than ten tokens that the training text has, too. The
two may differ at up to four positions of the span, none of them among its first ten tokens or at its end. Spans are found by a
hash of their first ten tokens and then extended, so the corpus is read once and only the evaluation sets are held in memory.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from llama2_jax.config import UserError
from llama2_jax.evals.task import Example
from llama2_jax.text.tables import markdown_table

PREFIX = 10  # tokens that match without a gap
SKIPS = 4  # positions at which a span may differ
LENGTHS = (10, 20, 30, 40, 50)  # shortest spans that count
SUBSETS = {'clean': (0.0, 0.2), 'not clean': (0.2, 1.01), 'not dirty': (0.0, 0.8), 'dirty': (0.8, 1.01)}  # low <= share < high


def verbalise(example: Example) -> str:
    """The whole sample as text: question, choices and answer."""
    if example.choices:
        contexts = dict.fromkeys(context for context, _ in example.choices)
        return '\n'.join([*contexts, *dict.fromkeys(continuation for _, continuation in example.choices)])
    asked = example.prompt if isinstance(example.prompt, str) else '\n'.join(turn['content'] for turn in example.prompt)
    target = example.target[0] if isinstance(example.target, list | tuple) and example.target else example.target
    return f'{asked} {target}' if isinstance(target, str) else asked


def hashes(ids: np.ndarray) -> np.ndarray:
    """A hash of the PREFIX tokens from each position on, [len(ids) - PREFIX + 1] uint64; empty if there are fewer."""
    count = len(ids) - PREFIX + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    found = np.zeros(count, np.uint64)
    for offset in range(PREFIX):
        found = found * np.uint64(0x9E3779B97F4A7C15) + ids[offset : offset + count].astype(np.uint64) + np.uint64(1)
    return found ^ (found >> np.uint64(29))


class Spans:
    """The longest span with the training text at each token of the evaluation samples.

    Args:
      samples: Token ids of each sample.

    Attributes:
      longest: For each sample, the length of the longest span that covers each token, 0 for none.
    """

    def __init__(self, samples: Sequence[Sequence[int]]):
        self._samples = [np.asarray(ids, np.int64) for ids in samples]
        self.longest = [np.zeros(len(ids), np.int32) for ids in self._samples]
        found = [hashes(ids) for ids in self._samples]
        self._hashes = np.concatenate(found) if found else np.zeros(0, np.uint64)
        self._sample = np.repeat(np.arange(len(found)), [len(some) for some in found])
        self._position = np.concatenate([np.arange(len(some)) for some in found]) if found else np.zeros(0, np.int64)
        order = np.argsort(self._hashes, kind='stable')
        self._hashes, self._sample, self._position = (x[order] for x in (self._hashes, self._sample, self._position))

    def add(self, document: Sequence[int]) -> None:
        """Takes in the token ids of a training document."""
        ids = np.asarray(document, np.int64)
        ours = hashes(ids)
        low, high = (np.searchsorted(self._hashes, ours, side) for side in ('left', 'right'))
        # Of each place in the document, the places in the samples; a sample and a difference of places are one diagonal.
        diagonals = {
            (int(self._sample[entry]), int(self._position[entry]) - int(place))
            for place in np.flatnonzero(high > low)
            for entry in range(low[place], high[place])
        }
        for sample, difference in diagonals:
            self._extend(sample, difference, ids)

    def _extend(self, sample: int, difference: int, ids: np.ndarray) -> None:
        """Records all spans of a sample whose token i is compared with token i - difference of a document."""
        start, stop = max(difference, 0), min(len(self._samples[sample]), len(ids) + difference)
        same = self._samples[sample][start:stop] == ids[start - difference : stop - difference]
        run = np.convolve(same, np.ones(PREFIX, int), 'valid') == PREFIX if len(same) >= PREFIX else np.zeros(0, bool)
        different = np.append(np.flatnonzero(~same), [len(same)] * (SKIPS + 1))
        last = np.maximum.accumulate(np.where(same, np.arange(len(same)), -1))  # the match at or before each position
        for first in np.flatnonzero(run):
            limit = different[np.searchsorted(different, first) + SKIPS]  # the position of the fifth difference
            length = int(last[limit - 1]) - int(first) + 1
            covered = self.longest[sample][start + first : start + first + length]
            np.maximum(covered, length, out=covered)

    def shares(self, shortest: int) -> np.ndarray:
        """The contaminated share of each sample's tokens, by spans of at least `shortest` and more than PREFIX tokens."""
        needed = max(shortest, PREFIX + 1)
        return np.array([float((spans >= needed).mean()) if len(spans) else 0.0 for spans in self.longest])


@dataclasses.dataclass(frozen=True)
class Subset:
    """Some samples of a set (a row of the paper's Table 51).

    Attributes:
      name: A key of SUBSETS.
      count: Number of samples.
      contamination: Mean contaminated share.
      score: Mean score; None if there are no samples.
      z: Its distance from the mean of the whole set, in standard errors of a mean of so many samples; None if not defined.
    """

    name: str
    count: int
    contamination: float
    score: float | None
    z: float | None


def subsets(shares: Sequence[float], scores: Sequence[float]) -> list[Subset]:
    """The four subsets of a set with their scores.

    For example:

        >>> [(one.name, one.count, one.score) for one in subsets([0.0, 0.1, 0.5, 0.9], [0.0, 1.0, 1.0, 1.0])]
        [('clean', 2, 0.5), ('not clean', 2, 1.0), ('not dirty', 3, 0.6666666666666666), ('dirty', 1, 1.0)]
    """
    share, score, found = np.asarray(shares, float), np.asarray(scores, float), []
    mean, deviation = score.mean(), score.std()
    for name, (low, high) in SUBSETS.items():
        inside = (share >= low) & (share < high)
        count = int(inside.sum())
        average = float(score[inside].mean()) if count else None
        z = (average - mean) / deviation * math.sqrt(count) if average is not None and deviation > 0 else None
        found.append(Subset(name, count, float(share[inside].mean()) if count else 0.0, average, z and float(z)))
    return found


def affected(found: Iterable[Subset]) -> bool:
    """Whether contamination shows in the score, as the paper decides it: |z| > 2 in all four subsets."""
    return all(one.z is not None and abs(one.z) > 2 for one in found)


def as_rows(task: str, spans: Spans, scores: Sequence[float]) -> list[dict[str, Any]]:
    """The subsets of a set at each length of LENGTHS, as rows of JSON.

    Raises:
      UserError: There is not one score for each sample.
    """
    if len(scores) != len(spans.longest):
        raise UserError(
            f'{task} has {len(scores)} scores for {len(spans.longest)} samples, so its subsets cannot be compared: '
            'leave it out of --tasks.'
        )
    rows = []
    for shortest in LENGTHS:
        found = subsets(spans.shares(shortest), scores)
        rows += [{'task': task, 'L': shortest, 'affected': affected(found)} | dataclasses.asdict(one) for one in found]
    return rows


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The paper's Table 51: the subsets of each set at the L whose smallest |z| is largest."""

    def strength(shortest: int, of: Sequence[dict[str, Any]]) -> float:
        return min(abs(row['z'] or 0.0) for row in of if row['L'] == shortest)

    def shown(row: dict[str, Any]) -> dict[str, Any]:
        return {
            'set': row['task'],
            'L': row['L'],
            'subset': row['name'],
            'n': f'{row["count"]:,}',
            'contamination': f'{row["contamination"]:.1%}' if row['count'] else '–',
            'score': '–' if row['score'] is None else f'{row["score"]:.1%}',
            'z': '–' if row['z'] is None else f'{row["z"]:.2f}',
            'affected': 'yes' if row['affected'] else 'no',
        }

    found = []
    for task in dict.fromkeys(row['task'] for row in rows):
        of = [row for row in rows if row['task'] == task]
        chosen = max(LENGTHS, key=lambda shortest: strength(shortest, of))
        found += [shown(row) for row in of if row['L'] == chosen]
    return markdown_table(found)
