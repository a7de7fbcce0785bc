"""Synchronous strategies against formulas, with ranks as threads and an optimizer in three lines of NumPy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import set_up
from stepping import take_step as step_of
from thread_comm import on_ranks

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import NumericError
from tf_dist.parallel import flat_buffer
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.reduction_tree import BlockSum, order
from tf_dist.parallel.totals import LOSS, STOP, TOKENS, Totals, scale_of
from tf_dist.strategies import AllReduce, ParameterServer

P = 6
strategies = pytest.mark.parametrize("strategy", [AllReduce, ParameterServer])
sizes = pytest.mark.parametrize("size", [1, 2, 3, 4])


class Momentum:
    """A `Replica`: gradient descent with momentum, so that a second step depends on the first."""

    parameters = P
    norm = staticmethod(flat_buffer.norm)

    def complete(self, gradient):
        return gradient

    def __init__(self):
        self.weights = np.arange(P, dtype=np.float32)
        self.velocity = np.zeros(P, np.float32)
        self.steps = self.applied = 0

    def apply(self, gradient, scale):
        self.velocity = np.float32(0.5) * self.velocity + gradient * np.float32(scale)
        self.weights -= self.velocity
        self.steps += 1
        self.applied += 1

    def skip(self):
        self.steps += 1

    def read_weights(self, out):
        out[:] = self.weights

    def write_weights(self, weights):
        self.weights[:] = weights


def one_each(size):
    """A micro-batch for each rank: its leaf of the tree."""
    return [range(rank, rank + 1) for rank in range(size)]


def take_step(strategy, blocks, gradients, tokens, clip_norm, replica, comm):
    """One step in which rank r has the micro-batches ``blocks[r]``; the totals and the norm."""
    leaves = range(len(gradients))
    made = set_up(strategy(), comm, replica, blocks[comm.rank], len(gradients))
    mine, totals = BlockSum(P, leaves, blocks[comm.rank]), Totals(len(gradients))
    for leaf in blocks[comm.rank]:
        mine.add(gradients[leaf])
        totals.add(leaf, np.array([leaf + 1.0, tokens[leaf], 0.0]))
    if comm.rank == 1:
        totals.ask_to_stop()
    norm = step_of(made, mine.terms(), order(leaves, blocks), totals, clip_norm, replica, Mesh(comm))
    return totals.sum(), norm


def run(strategy, gradients, tokens, clip_norm=0.0, rounds=1, blocks=None):
    """Take ``rounds`` steps; a (replica, totals, norm) for each rank."""
    blocks = blocks or one_each(len(gradients))

    def work(comm):
        replica = Momentum()
        for _ in range(rounds):
            totals, norm = take_step(strategy, blocks, gradients, tokens, clip_norm, replica, comm)
        return replica, totals, norm

    outcomes = on_ranks(len(blocks), work)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


@strategies
@sizes
def test_tokens_are_what_is_weighed_and_not_ranks(strategy, size):
    # Rank r has r + 1 tokens, each with gradient r: whole numbers, so the arithmetic is exact.
    tokens = [rank + 1.0 for rank in range(size)]
    gradients = [np.full(P, rank * (rank + 1), np.float32) for rank in range(size)]
    mean = np.float32(1.0 / sum(tokens)) * np.float32(sum(rank * (rank + 1) for rank in range(size)))
    for replica, totals, norm in run(strategy, gradients, tokens):
        assert replica.weights.tolist() == (np.arange(P, dtype=np.float32) - mean).tolist()
        assert totals[TOKENS] == sum(tokens)
        assert totals[LOSS] == size * (size + 1) / 2
        assert totals[STOP] == (size > 1)
        assert norm == pytest.approx(float(mean) * np.sqrt(P), rel=1e-6)


@strategies
def test_a_rank_without_data_changes_nothing(strategy):
    gradient = np.linspace(-1, 1, P).astype(np.float32)
    [(alone, _, norm)] = run(strategy, [gradient], [7.0])
    for replica, _, norm_here in run(strategy, [gradient, np.zeros(P, np.float32)], [7.0, 0.0]):
        assert replica.weights.tobytes() == alone.weights.tobytes()
        assert norm_here == norm


@strategies
def test_no_tokens_anywhere_is_no_change(strategy):
    for replica, _, norm in run(strategy, [np.zeros(P, np.float32)] * 2, [0.0, 0.0], clip_norm=1.0):
        assert replica.weights.tolist() == list(range(P))
        assert norm == 0


@strategies
@sizes
@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, 5.0), (10.0, 5.0), (5.0, 5.0), (0.5, 0.5)])
def test_the_mean_gradient_is_clipped_after_the_sum(strategy, size, clip_norm, expected):
    # (3, 4, 0 ...) has norm 5; each rank alone has a gradient far beyond any clip_norm.
    mean = np.array([3, 4] + [0] * (P - 2), np.float32)
    gradients = [mean * 2 * size if rank == 0 else np.zeros(P, np.float32) for rank in range(size)]
    for replica, _, norm in run(strategy, gradients, [2.0] * size, clip_norm):
        assert norm == pytest.approx(5.0)  # before clipping
        step = np.arange(P) - replica.weights
        assert np.linalg.norm(step) == pytest.approx(expected, rel=1e-6)
        assert step[0] / step[1] == pytest.approx(0.75)


@strategies
@sizes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_on_one_rank_is_known_to_all_and_changes_none(strategy, size, bad):
    replicas = [Momentum() for _ in range(size)]

    def work(comm):
        gradients = [np.ones(P, np.float32) for _ in range(size)]
        gradients[-1][2] = bad
        return take_step(strategy, one_each(size), gradients, [3.0] * size, 1.0, replicas[comm.rank], comm)

    norms = [norm for _, norm in on_ranks(size, work)]
    assert not np.isfinite(norms).any()
    assert len({np.float64(norm).tobytes() for norm in norms}) == 1
    for replica in replicas:
        assert replica.weights.tolist() == list(range(P))
        assert (replica.steps, replica.applied) == (0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_step_can_be_scaled_by_what_is_not_finite(bad):
    """What strategies that do not skip such a step end with."""
    with pytest.raises(NumericError, match="no weight has changed") as caught:
        scale_of(bad, np.array([1.0, 2.0, 0.0, 0.0]), 1.0)
    assert caught.value.exit_code == 76
    assert "--learning-rate" in str(caught.value)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 2**32), st.sampled_from([0.0, 0.5]))
def test_master_is_allreduce_bit_for_bit(size, seed, clip_norm):
    random = np.random.default_rng(seed)
    gradients = list((random.standard_normal((size, P)) * 10.0 ** random.integers(-4, 5)).astype(np.float32))
    tokens = random.integers(0, 50, size).astype(float)
    both = [
        run(strategy, gradients, tokens, clip_norm, rounds=3) for strategy in (AllReduce, ParameterServer)
    ]
    states = {
        (replica.weights.tobytes(), norm, totals.tobytes()) for side in both for replica, totals, norm in side
    }
    assert len(states) == 1


def test_with_master_one_rank_computes_and_all_count():
    outcomes = run(ParameterServer, [np.ones(P, np.float32)] * 3, [1.0] * 3, rounds=2)
    assert [replica.applied for replica, _, _ in outcomes] == [2, 0, 0]
    assert [replica.steps for replica, _, _ in outcomes] == [2, 2, 2]


@strategies
def test_one_process(strategy):
    replica = Momentum()
    gradient = np.full(P, 4, np.float32)
    _, norm = take_step(strategy, one_each(1), [gradient], [2.0], 0.0, replica, SerialComm())
    assert norm == pytest.approx(2 * np.sqrt(P))
    assert replica.weights.tolist() == (np.arange(P) - 2).tolist()


@st.composite
def blocks_of(draw):
    """Blocks of neighbouring micro-batches for some ranks, uneven, and some of them empty."""
    leaves = draw(st.integers(1, 12))
    cuts = sorted(draw(st.lists(st.integers(0, leaves), min_size=0, max_size=5)))
    return [range(*cut) for cut in zip([0, *cuts], [*cuts, leaves], strict=True)]


@settings(max_examples=40)
@given(blocks_of(), st.integers(0, 2**32), st.sampled_from([0.0, 0.5]))
def test_ranks_never_change_a_bit(blocks, seed, clip_norm):
    """The signature: whoever has which micro-batches, weights, norm and totals are those of one rank."""
    random = np.random.default_rng(seed)
    leaves = sum(map(len, blocks))
    scales = 10.0 ** random.integers(-4, 5, (leaves, P))
    gradients = list((random.standard_normal((leaves, P)) * scales).astype(np.float32))
    tokens = (random.integers(0, 50, leaves) + random.random(leaves)).tolist()  # not exact when added
    for strategy in (AllReduce, ParameterServer):
        [(alone, serial, norm_alone)] = run(
            strategy, gradients, tokens, clip_norm, rounds=3, blocks=[range(leaves)]
        )
        for replica, totals, norm in run(strategy, gradients, tokens, clip_norm, rounds=3, blocks=blocks):
            assert replica.weights.tobytes() == alone.weights.tobytes()
            assert norm == norm_alone
            assert totals[:STOP].tobytes() == serial[:STOP].tobytes()
