"""Rows of a task in one array: batches, padding, and what is refused."""

import numpy as np
import pytest

from tf_dist.data.rows import Examples
from tf_dist.errors import DataError

WORDS = np.arange(12, dtype=np.int32)


def test_inputs_and_targets_stand_side_by_side():
    rows = Examples(WORDS, 3, 1)
    assert len(rows) == 3
    x, y = rows.rows([2, 0])
    assert (x.tolist(), y.tolist()) == ([[8, 9, 10], [0, 1, 2]], [[11], [3]])
    x[:] = 99
    assert rows.rows([0])[0].tolist() == [[0, 1, 2]], "a batch is a copy"


def test_a_row_of_padding_has_no_targets():
    x, y = Examples(WORDS, 2, 2).rows([-1, 1])
    assert (x.tolist(), y.tolist()) == ([[0, 0], [4, 5]], [[-1, -1], [6, 7]])


def test_no_rows():
    none = Examples(WORDS[:0], 3, 2)
    assert len(none) == 0
    x, y = none.rows([-1, -1])
    assert (x.shape, y.tolist()) == ((2, 3), [[-1, -1]] * 2)
    none.must_be_below(1)


@pytest.mark.parametrize("index", [3, -2])
def test_no_such_row(index):
    with pytest.raises(IndexError, match="there are 3"):
        Examples(WORDS, 3, 1).rows([index])


@pytest.mark.parametrize(
    ("words", "seq_len", "targets"),
    [
        (WORDS[:11], 3, 1), (WORDS.astype(np.int64), 3, 1), (WORDS.astype(np.float32), 3, 1),
        (WORDS.astype(np.uint32), 3, 1), (WORDS.reshape(3, 4), 3, 1), (WORDS, 0, 4), (WORDS, 4, 0),
        (WORDS, 0, 0), (WORDS, 5, -1),
    ],
)  # fmt: skip
def test_what_is_no_array_of_rows_is_refused(words, seq_len, targets):
    with pytest.raises(DataError, match="rows of"):
        Examples(words, seq_len, targets)


def test_targets_must_be_classes_of_the_model():
    words = np.array([7, 7, 0, 7, 7, 2, 7, 7, -1], np.int32)
    Examples(words, 2, 1).must_be_below(3)
    with pytest.raises(DataError, match="target 2 of row 1 is none of the model's 2 classes"):
        Examples(words, 2, 1).must_be_below(2)
    words[8] = -2
    with pytest.raises(DataError, match="target -2 of row 2"):
        Examples(words, 2, 1).must_be_below(3)
