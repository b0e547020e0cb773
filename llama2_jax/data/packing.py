"""Tokens become sequences of L targets with segment ids. Plain numpy.

Pretraining concatenates and splits: documents are BOS + text + EOS, laid end to end and cut without regard to where they begin
(recipe C). Sequence j of length L is tokens [j*L, j*L + L] of the stream, both ends included: L inputs, and the same
shifted by one as L targets. Neighbours share one token, so every token but the stream's first is a target exactly once.

Dialogs are never split: `best_fit` puts whole ones together.
"""

import bisect
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
    begun in the row before. Padding has segment id 0 and token id 0; it is known by the row's length, never by a
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


def best_fit(lengths: np.ndarray, room: int) -> list[list[int]]:
    """Puts items into rows of `room` tokens so that little is left over: the longest first, each where it leaves least room.

    Args:
      lengths: tokens of each item, at least 1 and at most `room`.

    Returns:
      The items of each row. Items of one length are taken in a fixed shuffled order.

    >>> sorted(sorted(row) for row in best_fit(np.array([3, 5, 4, 6, 2]), 10))
    [[0, 1, 4], [2, 3]]
    """
    shuffled = np.random.default_rng(0).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind='stable')]
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # rows by what is left in them
    rooms: list[int] = []  # the keys of `by_room` that have rows, ascending
    for item, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            row, left = len(rows), room
            rows.append([])
        else:
            left = rooms[at]
            row = by_room[left].pop()
            if not by_room[left]:
                del rooms[at]
        rows[row].append(item)
        left -= length
        if left:
            if not by_room.get(left):
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(row)
    return rows
