import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.data.sampler import Permutation, Sampler, mix, mix_words, share
from tf_dist.errors import UsageError

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(-(2**70), 2**70)


def test_mix_is_splitmix64():
    # The first output of Vigna's reference splitmix64.c for the state 0.
    assert mix(0) == 0xE220A8397B1DCDAF


@quick
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
def test_mix_words_is_mix(values):
    assert mix_words(np.array(values, dtype=np.uint64)).tolist() == [mix(value) for value in values]


def test_golden_order():
    # A resumed run on another version must see the same order: this list never changes.
    places = np.arange(20)
    assert Permutation(20, seed=42, epoch=0)(places).tolist() == [
        15, 16, 11, 1, 18, 19, 8, 4, 14, 5, 17, 3, 9, 6, 13, 2, 12, 10, 7, 0,
    ]  # fmt: skip
    assert Permutation(20, seed=42, epoch=1)(places).tolist() == [
        7, 8, 2, 1, 9, 16, 13, 15, 12, 5, 10, 19, 6, 4, 17, 0, 3, 18, 11, 14,
    ]  # fmt: skip


def test_golden_batches_over_the_end_of_an_epoch():
    sampler = Sampler(10, 4, seed=7)
    assert [sampler.batch(step).tolist() for step in range(4)] == [
        [9, 0, 7, 1], [6, 5, 3, 8], [4, 2, -1, -1], [0, 7, 3, 4],
    ]  # fmt: skip


@quick
@given(st.integers(1, 300), st.integers(1, 50), seeds, st.integers(0, 3), st.booleans())
def test_each_sequence_exactly_once_per_epoch(n, global_batch_size, seed, epoch, shuffle):
    sampler = Sampler(n, global_batch_size, seed, shuffle)
    steps = range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch)
    batches = [sampler.batch(step) for step in steps]
    assert all(batch.shape == (global_batch_size,) and batch.dtype == np.int64 for batch in batches)
    drawn = np.concatenate(batches)
    assert sorted(drawn[drawn >= 0].tolist()) == list(range(n))
    assert (drawn[n:] == -1).all()


@quick
@given(st.integers(1, 300), seeds, st.integers(0, 9))
def test_order_does_not_depend_on_the_batch_size(n, seed, epoch):
    one, other = Sampler(n, n, seed), Sampler(n, 7, seed)
    steps = range(epoch * other.steps_per_epoch, (epoch + 1) * other.steps_per_epoch)
    assert np.concatenate([other.batch(step) for step in steps])[:n].tolist() == one.batch(epoch).tolist()


def test_epochs_and_seeds_differ_and_all_orders_occur():
    orders = {tuple(Permutation(4, seed, epoch)(np.arange(4))) for seed in range(20) for epoch in range(20)}
    assert len(orders) == 24


def test_without_shuffle_it_is_the_order_of_the_data():
    assert Sampler(5, 2, 1, shuffle=False).batch(1).tolist() == [2, 3]
    assert Sampler(5, 2, 1, shuffle=False).batch(2).tolist() == [4, -1]


def test_a_huge_corpus_costs_no_memory():
    batch = Sampler(10**12, 8, 3).batch(10**9)
    assert len(set(batch.tolist())) == 8
    assert batch.min() >= 0


def test_no_sequences_no_steps():
    assert Sampler(0, 4, 1).steps_per_epoch == 0
    with pytest.raises(IndexError):
        Sampler(0, 4, 1).batch(0)


@pytest.mark.parametrize(("n", "rows"), [(-1, 4), (4, 0)])
def test_sampler_refuses(n, rows):
    with pytest.raises(UsageError) as caught:
        Sampler(n, rows, 1)
    assert caught.value.exit_code == 64


@quick
@given(st.integers(0, 300), st.integers(1, 20))
def test_shares_are_balanced_and_cover_everything_in_order(n, size):
    blocks = [share(n, rank, size) for rank in range(size)]
    assert [item for block in blocks for item in block] == list(range(n))
    lengths = [len(block) for block in blocks]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("n", "rank", "size"), [(-1, 0, 1), (4, 2, 2), (4, -1, 2), (4, 0, 0)])
def test_share_refuses(n, rank, size):
    with pytest.raises(UsageError):
        share(n, rank, size)


@given(st.integers(1, 3000), st.integers(1, 50), st.integers(0, 9), st.booleans())
def test_batches_worked_out_together_are_those_of_each_step_alone(n, rows, seed, shuffle):
    together = Sampler(n, rows, seed, shuffle)
    for step in (0, 1, together.steps_per_epoch - 1, together.steps_per_epoch, 5):
        alone = Sampler(n, rows, seed, shuffle)
        alone._block_steps = 1
        np.testing.assert_array_equal(together.batch(step), alone.batch(step))
