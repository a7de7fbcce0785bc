import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.data.split import check_fraction, choose_validation, train_characters
from tf_dist.errors import UsageError

some_sizes = st.lists(st.integers(1, 10_000), min_size=2, max_size=60)


@settings(deadline=None, max_examples=100)
@given(some_sizes, st.floats(0.001, 0.999), st.integers(0, 5))
def test_both_sides_get_something_and_validation_not_too_much(sizes, fraction, seed):
    array = np.array(sizes, dtype=np.int64)
    chosen = choose_validation(array, fraction, seed)
    assert 0 < chosen.sum() < len(sizes)
    share = array[chosen].sum()
    assert share <= max(array.sum() * fraction, array.min())
    # What was left over is smaller than any document that was left out, or nothing fitted at all.
    assert array.sum() * fraction - share < array[~chosen].min() + 1 or chosen.sum() == 1
    assert (chosen == choose_validation(array, fraction, seed)).all()


def test_the_share_is_about_right_and_the_seed_chooses():
    sizes = np.full(1000, 7, dtype=np.int64)
    assert choose_validation(sizes, 0.1, 1).sum() == 100
    assert (choose_validation(sizes, 0.1, 1) != choose_validation(sizes, 0.1, 2)).any()


def test_golden_choice():
    # A prepared corpus must come out the same on every machine and version.
    chosen = choose_validation(np.full(12, 5, dtype=np.int64), 0.25, 1)
    assert np.flatnonzero(chosen).tolist() == [6, 8, 9]


def test_nothing_to_choose():
    assert not choose_validation(np.array([5, 5]), 0.0, 1).any()
    assert not choose_validation(np.array([5]), 0.5, 1).any()


def test_characters_as_in_nanogpt():
    assert train_characters(1_115_394, 0.1) == 1_003_854


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(UsageError, match="val_fraction is"):
        check_fraction(fraction)
