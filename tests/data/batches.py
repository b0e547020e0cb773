"""Comparing batches."""

import numpy as np


def equal(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(np.array_equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def concatenated(per_process):
    return [
        {k: np.concatenate([batch[k] for batch in batches]) for k in batches[0]} for batches in zip(*per_process, strict=True)
    ]
