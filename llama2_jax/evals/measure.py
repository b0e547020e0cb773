"""Figures of many records: means, counts, and 95 % intervals: Wilson's of shares, by the bootstrap of other means."""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

RESAMPLES = 1000
SCORES = ('sentiment', 'helpfulness', 'harmlessness', 'f1', 'mc2')  # measures that are more than yes or no of a record
Record = Mapping[str, Any]


def means(records: Sequence[Record]) -> dict[str, float]:
    """The mean of every measure, over the records that have it."""
    return {name: float(np.mean(values)) for name, values in _values(records).items()}


def counts(records: Sequence[Record]) -> dict[str, int]:
    """How many records have each measure."""
    return {name: len(values) for name, values in _values(records).items()}


def shares(records: Sequence[Record]) -> list[str]:
    """The measures that are yes or no of each record, so that their means are shares."""
    return [name for name, values in _values(records).items() if name not in SCORES and set(values) <= {0.0, 1.0}]


def _values(records: Sequence[Record]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if type(value) is float and name != 'prediction':
                found.setdefault(name, []).append(value)
    return found


T = TypeVar('T')


def by_group(records: Sequence[Record], figures: Callable[[Sequence[Record]], dict[str, T]] = means) -> dict[str, dict[str, T]]:
    """Figures of each group, of which a record may have several; none where there is but one."""
    members: dict[str, list[Record]] = {}
    for record in records:
        for group in [record['group']] if isinstance(record['group'], str) else record['group']:
            members.setdefault(group, []).append(record)
    return {group: figures(members[group]) for group in sorted(members)} if len(members) > 1 else {}


def spread(items: Sequence[T], limit: int) -> list[T]:
    """So many of them, evenly spread, so that every subject is among them; all where `limit` is 0."""
    if not limit or limit >= len(items):
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, limit).astype(int)]


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of so many.

    For example:

        >>> [round(bound, 3) for bound in wilson(0.0, 10)]
        [0.0, 0.278]
    """
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)  # exactly 0 and 1 at the ends


def bounds(low: float, high: float, share: float | None = None) -> str:
    """An interval in per cent; that of no hits at all is an upper bound.

    >>> bounds(0.0291, 0.2183, 0.083), bounds(*wilson(0.0, 36), 0.0)
    ('2.9–21.8', '< 9.6')
    """
    return f'< {100 * high:.1f}' if share == 0 else f'{100 * low:.1f}–{100 * high:.1f}'


def share_text(hits: int, count: int) -> str:
    """A share with its number and Wilson's interval, for people.

    >>> share_text(3, 36), share_text(0, 315), share_text(0, 0)
    ('8.3 % (2.9–21.8, n = 36)', '0.0 % (< 1.2, n = 315)', '– (n = 0)')
    """
    if not count:
        return '– (n = 0)'
    share = hits / count
    return f'{100 * share:.1f} % ({bounds(*wilson(share, count), share)}, n = {count:,})'


def resampled(values: Sequence[float], name: str) -> np.ndarray:
    """The means of RESAMPLES samples of the values, drawn with replacement; always the same ones for a name."""
    values, rng = np.asarray(values, np.float64), np.random.default_rng(zlib.crc32(name.encode()))
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)])


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
