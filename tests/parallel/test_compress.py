"""The laws of compression, on ranks as threads: nothing is lost, all decompress alike, rate 1 is nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from thread_comm import on_ranks

from tf_dist.comm.transport.base import SerialComm
from tf_dist.parallel.compress import BFloat16, OneBit, PowerSGD, TopK, gathered, largest
from tf_dist.parallel.onebit_allreduce import BLOCK, decode, encode, encoded_bytes

SHAPES = [(40, 24), (24,), (6, 5), (3, 16, 8)]
P = sum(int(np.prod(shape)) for shape in SHAPES)
STEPS = 4
MADE = {
    "bfloat16": lambda: ready(BFloat16()),
    "onebit": lambda: ready(OneBit()),
    "topk": lambda: ready(TopK(density=0.05)),
    "powersgd": lambda: ready(PowerSGD(rank=2)),
}


def ready(compressor, shapes=SHAPES):
    compressor.setup(shapes, SerialComm())
    return compressor


def gradient(rank, step, length=P):
    return np.random.default_rng([rank, step]).standard_normal(length).astype(np.float32)


def summed(ranks, make, steps=STEPS):
    """For each rank: gradients, sums and residuals of each step."""

    def work(comm):
        compressor, seen = make(), []
        for step in range(steps):
            own = gradient(comm.rank, step)
            found = compressor.aggregate(own, comm, np.empty_like(own)).copy()
            seen.append((own, found, compressor.residual.copy()))
        return seen

    return on_ranks(ranks, work)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", MADE)
def test_what_is_not_sent_stays(name, ranks):
    """Over all ranks and steps: gradients = what everyone stepped with + what is left."""
    seen = summed(ranks, MADE[name])
    before = np.zeros(P)
    for step in range(STEPS):
        given_ = sum(one[step][0].astype(np.float64) for one in seen)
        left = sum(one[step][2].astype(np.float64) for one in seen)
        np.testing.assert_allclose(seen[0][step][1] + left, given_ + before, atol=2e-5)
        before = left


@pytest.mark.parametrize("name", MADE)
def test_all_ranks_decompress_alike(name):
    seen = summed(3, MADE[name])
    for step in range(STEPS):
        assert len({one[step][1].tobytes() for one in seen}) == 1


def test_top_k_keeps_what_it_does_not_send_to_the_bit():
    seen = summed(1, MADE["topk"])[0]
    before = np.zeros(P, np.float32)
    for own, sent, left in seen:
        assert np.array_equal(sent + left, own + before)
        assert not (sent * left).any()  # each element either goes or stays
        before = left


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_density_of_one_is_the_plain_sum(ranks):
    seen = summed(ranks, lambda: ready(TopK(density=1.0)))
    for step in range(STEPS):
        total = sum(gradient(rank, step) for rank in range(ranks))
        assert np.array_equal(seen[0][step][1], total)
        assert not any(one[step][2].any() for one in seen)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_saves_nothing_is_the_plain_sum(ranks):
    seen = summed(ranks, lambda: ready(PowerSGD(rank=30)))
    for step in range(STEPS):
        assert np.array_equal(seen[0][step][1], sum(gradient(rank, step) for rank in range(ranks)))
        assert not any(one[step][2].any() for one in seen)


def test_power_sgd_finds_a_matrix_of_low_rank():
    """Three turns of power iteration on one matrix, as in the paper's warm start."""
    rng = np.random.default_rng(5)
    low = (rng.standard_normal((40, 2)) @ rng.standard_normal((2, 24))).astype(np.float32)

    def work(comm):
        compressor = ready(PowerSGD(rank=2), [(40, 24)])
        for _ in range(3):
            compressor.residual.fill(0.0)
            found = compressor.aggregate(low.reshape(-1) / comm.size, comm, np.empty(40 * 24, np.float32))
        return found.copy()

    for found in on_ranks(2, work):
        np.testing.assert_allclose(found.reshape(40, 24), low, atol=1e-3)


def test_power_sgd_reshapes_and_leaves_small_things_whole():
    compressor = ready(PowerSGD(rank=2))
    assert [(one.rows, one.columns) for one in compressor._matrices] == [(40, 24), (3, 128)][:1]
    assert compressor.ratio == pytest.approx(P / (2 * (40 + 24) + 24 + 30 + 384))


def test_without_feedback_an_element_would_never_go():
    """A small element that is always there adds up until it is sent."""

    def work(comm):
        compressor, total = ready(TopK(density=0.1), [(10,)]), np.zeros(10)
        for _ in range(60):
            own = np.full(10, 0.1, np.float32)
            own[0] = 1.0
            total += compressor.aggregate(own, comm, own)
        return total

    total = on_ranks(1, work)[0]
    assert total[0] == pytest.approx(60, rel=0.35)
    assert total[1:].min() > 3  # of 6


def test_deep_gradient_compression_forgets_momentum_where_it_sends():
    def work(comm):
        compressor = ready(TopK(density=0.1, momentum=0.9), [(100,)])
        for step in range(5):
            before = compressor.velocity * np.float32(0.9) + gradient(0, step, 100)
            own = gradient(0, step, 100)
            sent = compressor.aggregate(own, comm, own)
            assert not compressor.velocity[sent != 0].any()
            assert np.array_equal(compressor.velocity[sent == 0], before[sent == 0])
        return True

    assert on_ranks(1, work) == [True]


@given(st.integers(1, 3000), st.floats(0.001, 1.0), st.integers(0, 3))
def test_the_largest_are_found(length, density, kind):
    rng = np.random.default_rng(length)
    array = [
        rng.standard_normal(length),
        np.zeros(length),
        np.ones(length),
        np.sort(rng.standard_normal(length)),
    ][kind].astype(np.float32)
    count = max(1, round(density * length))
    places = largest(array, count)
    assert places.dtype == np.int32 and (np.diff(places) > 0).all()
    assert 1 <= places.size <= max(1.3 * count, 1)
    rest = np.delete(array, places)
    if rest.size:
        assert np.abs(array[places]).min() >= np.abs(rest).max()


def test_the_threshold_of_a_large_array_comes_from_a_sample():
    array = np.random.default_rng(1).standard_normal(2_000_000).astype(np.float32)
    places = largest(array, 20_000)
    assert 15_000 <= places.size <= 26_000
    assert np.abs(array[places]).min() >= np.abs(np.delete(array, places)).max()


@given(st.integers(0, 5000), st.integers(0, 9))
def test_signs_and_magnitudes(length, seed):
    array = np.random.default_rng([length, seed]).standard_normal(length).astype(np.float32)
    raw = np.empty(encoded_bytes(length), np.uint8)
    encode(array, raw)
    back = decode(raw, length)
    assert np.array_equal(back >= 0, array >= 0)
    for start in range(0, length, BLOCK):
        block = slice(start, start + BLOCK)
        np.testing.assert_allclose(np.abs(back[block]), np.abs(array[block]).mean(), rtol=1e-5)


def test_signs_are_a_thirty_second():
    assert encoded_bytes(1_000_000) < 4 * 1_000_000 / 31


def test_places_and_values_of_all_ranks():
    def work(comm):
        places = np.arange(comm.rank, 10, dtype=np.int32)
        return [(list(p), list(v)) for p, v in gathered(comm, places, places.astype(np.float32))]

    found = on_ranks(3, work)
    assert found[0] == found[1] == found[2] == [(list(range(r, 10)), list(range(r, 10))) for r in range(3)]
