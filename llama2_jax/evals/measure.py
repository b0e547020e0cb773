"""Figures of many records: means, and intervals by the bootstrap."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 1000
Record = Mapping[str, Any]


def means(records: Sequence[Record]) -> dict[str, float]:
    """The mean of every measure, over the records that have it."""
    names = dict.fromkeys(
        name for record in records for name, value in record.items() if type(value) is float and name != 'prediction'
    )
    return {name: float(np.mean([record[name] for record in records if name in record])) for name in names}


def by_group(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """The means of each group; none where there is but one."""
    groups = sorted({record['group'] for record in records})
    return {group: means([record for record in records if record['group'] == group]) for group in groups} if groups[1:] else {}


def resampled(values: Sequence[float], name: str) -> np.ndarray:
    """The means of RESAMPLES samples of the values, drawn with replacement; always the same ones for a name."""
    values, rng = np.asarray(values, np.float64), np.random.default_rng(zlib.crc32(name.encode()))
    return np.array([values[rng.integers(len(values), size=len(values))].mean() for _ in range(RESAMPLES)])


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 %."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
