import numpy as np
import pytest

from tf_dist.data.class_weights import class_weights
from tf_dist.errors import UsageError


def test_balanced_classes_weigh_the_same_in_the_sum_and_one_in_the_mean():
    counts = np.array([1, 3, 0, 6])
    weights = class_weights(counts, "balanced")
    assert np.allclose(weights * counts, [10 / 3, 10 / 3, 0, 10 / 3])
    assert np.isclose((weights * counts).sum() / counts.sum(), 1)
    assert weights[2] == 0


def test_none_is_all_ones():
    assert class_weights(np.array([5, 0]), "none").tolist() == [1, 1]


def test_refused():
    with pytest.raises(UsageError, match="use one of none balanced"):
        class_weights(np.array([1]), "sqrt")
    with pytest.raises(UsageError, match="there are none"):
        class_weights(np.array([0, 0]), "balanced")
