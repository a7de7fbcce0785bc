from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.data.split import (
    check_fraction,
    choose_validation,
    content_keys,
    split_rows,
    stratified_split,
    train_characters,
)
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


some_labels = st.lists(st.sampled_from("aaaaabbbcd"), min_size=2, max_size=200)


@settings(deadline=None, max_examples=200)
@given(some_labels, st.floats(0.01, 0.9), st.integers(0, 3))
def test_every_label_is_in_training_and_each_has_its_share(labels, fraction, seed):
    in_val = stratified_split(labels, fraction, seed)
    counts = Counter(labels)
    taken = Counter(label for label, chosen in zip(labels, in_val, strict=True) if chosen)
    for label, count in counts.items():
        assert taken[label] < count
        assert abs(taken[label] - count * fraction) <= 1 or taken[label] in (count - 1, 1)
    if max(counts.values()) > 1:
        assert in_val.any()


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")), min_size=2, max_size=100))
def test_equal_content_is_on_one_side_and_no_label_gets_lost(rows):
    # Keys of the text alone: one text may have several labels.
    keys = content_keys([(text,) for text, _ in rows])
    labels = [label for _, label in rows]
    in_val = stratified_split(labels, 0.3, 1, keys)
    sides = {}
    for (text, _), chosen in zip(rows, in_val, strict=True):
        assert sides.setdefault(text, chosen) == chosen
    assert {label for label, chosen in zip(labels, in_val, strict=True) if not chosen} == set(labels)


def test_a_label_that_shares_its_only_text_with_another_stays_in_training():
    keys = content_keys([(str(number),) for number in range(20)] + [(str(number),) for number in range(20)])
    labels = ["common"] * 20 + [f"rare {number}" for number in range(20)]
    for seed in range(5):
        assert not stratified_split(labels, 0.5, seed, keys)[20:].any()


def test_rows_are_chosen_by_their_content_wherever_they_stand():
    rows = [(str(number), "x") for number in range(200)] * 2
    in_val = split_rows(content_keys(rows), 0.1, 1)
    assert in_val.sum() == 40
    assert (in_val[:200] == in_val[200:]).all()
    backwards = split_rows(content_keys(rows[::-1]), 0.1, 1)
    assert (backwards[::-1] == in_val).all()
    assert (split_rows(content_keys(rows), 0.1, 2) != in_val).any()


def test_totals_are_exact_with_many_small_labels():
    labels = [f"label {number % 40}" for number in range(200)]  # 5 rows each: half a row of each is wanted
    assert stratified_split(labels, 0.1, 1).sum() == 20


def test_keys_tell_where_a_text_ends():
    rows = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("ab", "c")]
    assert len(set(content_keys(rows).tolist())) == 4


def test_golden_split_of_rows():
    # A prepared corpus must come out the same on every machine and version.
    in_val = stratified_split(["a", "b"] * 10, 0.25, 1, content_keys([(str(n),) for n in range(20)]))
    assert np.flatnonzero(in_val).tolist() == [2, 6, 9, 14, 19]


def test_nothing_to_split():
    keys = content_keys([("a",), ("b",)])
    assert not split_rows(keys, 0.0, 1).any()
    assert not split_rows(keys[:1], 0.5, 1).any()
    assert not split_rows(np.repeat(keys[:1], 3), 0.5, 1).any()
    with pytest.raises(UsageError, match="2 keys for 1 labels"):
        stratified_split(["a"], 0.5, 1, keys)
    with pytest.raises(UsageError, match="val_fraction is"):
        split_rows(keys, 1.0, 1)
