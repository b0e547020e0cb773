import numpy as np
import pytest

from llama2_jax.data.packing import count, pack, window


def test_literal_batch():
    rows = [
        np.array([1, 7, 2, 1, 8, 2], np.uint16),  # begins with a document
        np.array([2, 1, 9, 0, 1, 2], np.uint16),  # begins inside one; token 0 is a token like others
        np.array([1, 7, 2], np.uint16),  # the end of the stream
        np.array([], np.uint16),  # beyond it
    ]
    tokens, segment_ids = pack(rows, 5, bos=1)
    assert tokens.tolist() == [[1, 7, 2, 1, 8, 2], [2, 1, 9, 0, 1, 2], [1, 7, 2, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert segment_ids.tolist() == [[1, 1, 1, 2, 2, 2], [1, 2, 2, 2, 3, 3], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    assert tokens.dtype == segment_ids.dtype == np.int32


@pytest.mark.parametrize('total', [0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 22])
@pytest.mark.parametrize('length', [1, 2, 3, 5, 7])
def test_every_token_but_the_first_is_a_target_once(total, length):
    stream = np.arange(total)
    rows = [stream[slice(*window(j, length, total))] for j in range(count(total, length))]
    targets = [int(t) for row in rows for t in row[1:]]
    inputs = [int(t) for row in rows for t in row[:-1]]
    assert targets == list(range(1, total))
    assert inputs == list(range(total - 1))
    assert all(len(row) == length + 1 for row in rows[:-1])
    assert all(2 <= len(row) <= length + 1 for row in rows)
