"""Noise of masked language models: BERT's shares, and what it is a function of."""

import numpy as np
import pytest

from tf_dist.config import Config
from tf_dist.data.tokens import Sequences
from tf_dist.tasks.masked_lm import MaskedRows, _key, _uniform, noised
from tf_dist.tasks.registry import task_of

V, T = 50, 16
TEXT = np.random.default_rng(1).integers(0, V, 20_001).astype(np.uint16)
LAYOUT = task_of(Config(task="masked-lm", seq_len=T)).layout(V)


def masked(seed=1, text=TEXT):
    return MaskedRows(Sequences(text, T), LAYOUT, seed)


def same(one, other):
    return all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_shares_are_those_of_bert():
    rows = masked()
    plain, _ = Sequences(TEXT, T).rows(np.arange(len(rows)))
    x, y = rows.rows(np.arange(len(rows)), (3, 0))
    chosen = y != -1
    count = chosen.sum()
    # Four standard deviations of a binomial, each.
    assert chosen.mean() == pytest.approx(0.15, abs=4 * np.sqrt(0.15 * 0.85 / y.size))
    hidden = (x == LAYOUT.mask) & chosen
    kept = (x == plain) & chosen
    random = chosen & ~hidden & ~kept
    assert hidden.sum() / count == pytest.approx(0.8, abs=4 * np.sqrt(0.8 * 0.2 / count))
    # Of the random ones, one in V is the token itself.
    assert random.sum() / count == pytest.approx(0.1 * (1 - 1 / V), abs=4 * np.sqrt(0.1 * 0.9 / count))
    assert kept.sum() / count == pytest.approx(0.1 + 0.1 / V, abs=4 * np.sqrt(0.1 * 0.9 / count))
    assert set(np.unique(x[random])) == set(range(V)), (
        "random tokens are all of the tokenizer's, and no others"
    )
    np.testing.assert_array_equal(x[~chosen], plain[~chosen])
    np.testing.assert_array_equal(y[chosen], plain[chosen])


def test_places_within_a_row_are_chosen_alike():
    _, y = masked().rows(np.arange(1250), (0, 0))
    share = (y != -1).mean(axis=0)
    assert np.abs(share - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 1250)


def test_noise_is_a_function_of_seed_step_and_micro_batch():
    rows, some = masked(), np.array([4, 9, 2, 7])
    first = rows.rows(some, (5, 1))
    assert same(first, masked().rows(some, (5, 1)))
    others = [rows.rows(some, (6, 1)), rows.rows(some, (5, 2)), masked(2).rows(some, (5, 1))]
    others += [rows.rows(some, (1, 5)), rows.rows(some)]
    assert not any(same(first, other) for other in others)
    # Where it falls does not depend on the text.
    there = masked(text=TEXT[::-1].copy()).rows(some, (5, 1))
    np.testing.assert_array_equal(first[1] != -1, there[1] != -1)


def test_noise_of_validation_depends_on_the_row_alone():
    rows = masked()
    one_by_one = [rows.rows([row]) for row in range(8)]
    together = rows.rows(np.arange(8))
    backwards = rows.rows(np.arange(8)[::-1])
    for row, (x, y) in enumerate(one_by_one):
        assert same((x[0], y[0]), (together[0][row], together[1][row]))
        assert same((x[0], y[0]), (backwards[0][7 - row], backwards[1][7 - row]))
    assert not np.array_equal(one_by_one[0][1] != -1, one_by_one[1][1] != -1)
    assert not same(together, masked(2).rows(np.arange(8)))


def test_padding_has_no_noise_and_no_targets():
    rows = masked(text=TEXT[: 2 * T + 4])
    assert len(rows) == 3
    for draw in (None, (0, 0)):
        x, y = rows.rows([2, -1], draw)
        assert (x[0, 3:] == LAYOUT.pad).all() and (y[0, 3:] == -1).all(), "the last window is short"
        assert (x[1] == LAYOUT.pad).all() and (y[1] == -1).all()
    x, y = rows.rows([])
    assert x.shape == y.shape == (0, T)


def test_what_happens_to_a_chosen_token():
    x = np.arange(6, dtype=np.int32)[None]
    present = np.array([[True] * 5 + [False]])
    choice = np.array([[0.0, 0.1499, 0.1499, 0.15, 0.0, 0.0]])
    fate = np.array([[0.0, 0.8, 0.9, 0.0, 0.7999, 0.0]])
    other = np.array([[0.5, 0.999999, 0.0, 0.0, 0.0, 0.0]])
    found, y = noised(x, present, np.stack([choice, fate, other]), LAYOUT)
    assert found.tolist() == [[LAYOUT.mask, V - 1, 2, 3, LAYOUT.mask, LAYOUT.pad]]
    assert y.tolist() == [[0, 1, 2, -1, 4, -1]]


def test_the_numbers_are_the_same_on_every_machine():
    """Fixed: another noise would be another training."""
    assert _key(1, 2, 3) == _key(1, 2, 3) != _key(1, 3, 2)
    numbers = _uniform(_key(1, 2, 3), 2, 2)
    assert numbers.shape == (3, 2, 2) and (0 <= numbers).all() and (numbers < 1).all()
    assert len(np.unique(_uniform(7, 100, 100))) == 30_000
