"""Concatenate and split: one stream of document tokens becomes sequences of L targets with segment ids. Plain numpy.

Documents are BOS + text + EOS, laid end to end and cut without regard to where they begin (recipe C). Sequence j of length L is
tokens [j*L, j*L + L] of the stream, both ends included: L inputs, and the same shifted by one as L targets. Neighbours share one
token, so every token but the stream's first is a target exactly once.
"""

from collections.abc import Sequence

import numpy as np


def count(tokens: int, length: int) -> int:
    """Number of sequences of `length` targets in a stream of `tokens` tokens; the last may be partly padding.

    >>> count(9, 4), count(10, 4), count(1, 4)
    (2, 3, 0)
    """
    return -(-max(tokens - 1, 0) // length)


def window(sequence: int, length: int, tokens: int) -> tuple[int, int]:
    """First token of a sequence, and one past its last (the stream has `tokens` tokens).

    >>> window(0, 4, 10), window(1, 4, 10), window(2, 4, 10)
    ((0, 5), (4, 9), (8, 10))
    """
    return sequence * length, min(sequence * length + length + 1, tokens)


def pack(rows: Sequence[np.ndarray], length: int, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Stacks cut-out windows into (tokens, segment_ids), both int32 [B, L + 1].

    Segments 1, 2, 3… number the documents of a row from the left: a new one begins at every BOS, and the row's first may have
    begun in the row before. What a short row lacks is segment 0 and token 0; padding is known by the row's length, never by a
    token's value.

    >>> tokens, segments = pack([np.array([7, 2, 1, 5]), np.array([1, 0])], 3, bos=1)
    >>> tokens.tolist(), segments.tolist()
    ([[7, 2, 1, 5], [1, 0, 0, 0]], [[1, 1, 2, 2], [1, 1, 0, 0]])
    """
    tokens = np.zeros((len(rows), length + 1), np.int32)
    real = np.zeros(tokens.shape, bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        real[i, : len(row)] = True
    starts = tokens == bos
    starts[:, 0] = True
    return tokens, np.where(real, np.cumsum(starts, axis=1, dtype=np.int32), 0)
