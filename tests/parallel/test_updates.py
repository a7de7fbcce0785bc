"""Updates against formulas, with ranks as threads and an optimizer in three lines of NumPy."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.comm.base import Comm, SerialComm
from tf_dist.config import Config
from tf_dist.errors import NumericError
from tf_dist.parallel.tree import TreeSum
from tf_dist.parallel.updates import CORRECT, LOSS, STOP, TOKENS, UPDATES, allreduce, master

P = 6
LIMIT_S = 30.0
updates = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
sizes = pytest.mark.parametrize("size", [1, 2, 3, 4])


class ThreadComm(Comm):
    """One of several ranks that are threads of this process; sums in tree order."""

    def __init__(self, rank, size, board, meeting):
        super().__init__()
        self.rank, self.size = rank, size
        self._board, self._meeting = board, meeting

    def _everyone(self, value):
        self._board[self.rank] = value
        self._meeting.wait(LIMIT_S)
        everyone = list(self._board)
        self._meeting.wait(LIMIT_S)
        return everyone

    def _allreduce(self, array):
        tree = TreeSum(array.size)
        rows = self._everyone(array.copy())
        if array.dtype == np.float32:
            for row in rows:
                tree.add(row)
            array[:] = tree.result()
        else:
            array[:] = sum(rows)

    def _broadcast(self, array, root):
        array[:] = self._everyone(array.copy())[root]

    def _gather(self, array, root):
        rows = np.stack(self._everyone(array.copy()))
        return rows if self.rank == root else None

    def _barrier(self):
        self._everyone(None)

    def _allgather_bytes(self, raw):
        return self._everyone(raw)


def on_ranks(size, function):
    """What ``function(comm)`` returns or raises on each of ``size`` ranks."""
    board, meeting, outcomes = [None] * size, threading.Barrier(size), [None] * size

    def work(rank):
        try:
            outcomes[rank] = function(ThreadComm(rank, size, board, meeting))
        except Exception as error:
            outcomes[rank] = error
            if not isinstance(error, NumericError):
                meeting.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads), "ranks wait for each other"
    return outcomes


class Momentum:
    """A `Replica`: gradient descent with momentum, so that a second step depends on the first."""

    parameters = P

    def __init__(self):
        self.weights = np.arange(P, dtype=np.float32)
        self.velocity = np.zeros(P, np.float32)
        self.steps = self.applied = 0

    def norm(self, gradient):
        return float(np.linalg.norm(gradient.astype(np.float64)))

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


def totals_of(tokens, loss=1.0, correct=0.0, stop=0.0):
    totals = np.zeros(4)
    totals[[LOSS, TOKENS, CORRECT, STOP]] = loss, tokens, correct, stop
    return totals


def run(update, gradients, tokens, clip_norm=0.0, rounds=1):
    """Take ``rounds`` steps; a (replica, totals, norm) for each rank."""

    def work(comm):
        replica = Momentum()
        for _ in range(rounds):
            totals = totals_of(tokens[comm.rank], loss=comm.rank + 1, stop=comm.rank == 1)
            norm = update(gradients[comm.rank].copy(), totals, clip_norm, replica, comm)
        return replica, totals, norm

    outcomes = on_ranks(len(gradients), work)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return outcomes


def test_the_names_are_those_of_the_configuration():
    assert set(UPDATES) == set(Config.__dataclass_fields__["update"].metadata["choices"])


@updates
@sizes
def test_tokens_are_what_is_weighed_and_not_ranks(update, size):
    # Rank r has r + 1 tokens, each with gradient r: whole numbers, so the arithmetic is exact.
    tokens = [rank + 1.0 for rank in range(size)]
    gradients = [np.full(P, rank * (rank + 1), np.float32) for rank in range(size)]
    mean = np.float32(1.0 / sum(tokens)) * np.float32(sum(rank * (rank + 1) for rank in range(size)))
    for replica, totals, norm in run(update, gradients, tokens):
        assert replica.weights.tolist() == (np.arange(P, dtype=np.float32) - mean).tolist()
        assert totals[TOKENS] == sum(tokens)
        assert totals[LOSS] == size * (size + 1) / 2
        assert totals[STOP] == (size > 1)
        assert norm == pytest.approx(float(mean) * np.sqrt(P), rel=1e-6)


@updates
def test_a_rank_without_data_changes_nothing(update):
    gradient = np.linspace(-1, 1, P).astype(np.float32)
    [(alone, _, norm)] = run(update, [gradient], [7.0])
    for replica, _, norm_here in run(update, [gradient, np.zeros(P, np.float32)], [7.0, 0.0]):
        assert replica.weights.tobytes() == alone.weights.tobytes()
        assert norm_here == norm


@updates
def test_no_tokens_anywhere_is_no_change(update):
    for replica, _, norm in run(update, [np.zeros(P, np.float32)] * 2, [0.0, 0.0], clip_norm=1.0):
        assert replica.weights.tolist() == list(range(P))
        assert norm == 0


@updates
@sizes
@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, 5.0), (10.0, 5.0), (5.0, 5.0), (0.5, 0.5)])
def test_the_mean_gradient_is_clipped_after_the_sum(update, size, clip_norm, expected):
    # (3, 4, 0 ...) has norm 5; each rank alone has a gradient far beyond any clip_norm.
    mean = np.array([3, 4] + [0] * (P - 2), np.float32)
    gradients = [mean * 2 * size if rank == 0 else np.zeros(P, np.float32) for rank in range(size)]
    for replica, _, norm in run(update, gradients, [2.0] * size, clip_norm):
        assert norm == pytest.approx(5.0)  # before clipping
        step = np.arange(P) - replica.weights
        assert np.linalg.norm(step) == pytest.approx(expected, rel=1e-6)
        assert step[0] / step[1] == pytest.approx(0.75)


@updates
@sizes
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_on_one_rank_stops_all_and_changes_none(update, size, bad):
    replicas = [Momentum() for _ in range(size)]

    def work(comm):
        gradient = np.ones(P, np.float32)
        gradient[2] = bad if comm.rank == size - 1 else 1.0
        update(gradient, totals_of(3.0), 1.0, replicas[comm.rank], comm)

    for outcome in on_ranks(size, work):
        assert isinstance(outcome, NumericError)
        assert outcome.exit_code == 76
        assert "no weight has changed" in str(outcome)
        assert "--learning-rate" in str(outcome)
    for replica in replicas:
        assert replica.weights.tolist() == list(range(P))
        assert (replica.steps, replica.applied) == (0, 0)


@settings(max_examples=30)
@given(st.integers(1, 5), st.integers(0, 2**32), st.sampled_from([0.0, 0.5]))
def test_master_is_allreduce_bit_for_bit(size, seed, clip_norm):
    random = np.random.default_rng(seed)
    gradients = list((random.standard_normal((size, P)) * 10.0 ** random.integers(-4, 5)).astype(np.float32))
    tokens = random.integers(0, 50, size).astype(float)
    both = [run(update, gradients, tokens, clip_norm, rounds=3) for update in (allreduce, master)]
    states = {
        (replica.weights.tobytes(), norm, totals.tobytes()) for side in both for replica, totals, norm in side
    }
    assert len(states) == 1


def test_with_master_one_rank_computes_and_all_count():
    outcomes = run(master, [np.ones(P, np.float32)] * 3, [1.0] * 3, rounds=2)
    assert [replica.applied for replica, _, _ in outcomes] == [2, 0, 0]
    assert [replica.steps for replica, _, _ in outcomes] == [2, 2, 2]


@updates
def test_one_process(update):
    replica, totals = Momentum(), totals_of(2.0)
    assert update(np.full(P, 4, np.float32), totals, 0.0, replica, SerialComm()) == pytest.approx(
        2 * np.sqrt(P)
    )
    assert replica.weights.tolist() == (np.arange(P) - 2).tolist()
