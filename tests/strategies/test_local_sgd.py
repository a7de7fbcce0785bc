"""Local SGD and DiLoCo on ranks as threads, with a plain model, against the same arithmetic by one rank."""

from itertools import chain

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stepping import set_up, take_step
from thread_comm import on_ranks

from tf_dist.errors import NumericError
from tf_dist.parallel.bf16_allreduce import allreduce_bfloat16, from_bfloat16, to_bfloat16
from tf_dist.parallel.mesh import Mesh, leaves_of
from tf_dist.parallel.reduction_tree import BlockSum, order
from tf_dist.parallel.totals import Totals
from tf_dist.partition import share
from tf_dist.strategies import AllReduce, DiLoCo

P, M, RATE, R = 23, 5, 0.05, 3
BEGIN = np.random.default_rng(0).standard_normal(P).astype(np.float32)
MEAN = {"outer_lr": 1.0, "outer_momentum": 0.0}


class Plain:
    """A replica that steps by SGD."""

    parameters = P

    def __init__(self):
        self.weights, self.steps = BEGIN.copy(), 0

    def norm(self, gradient, squares=None):
        return float(np.linalg.norm(gradient.astype(np.float64)))

    def complete(self, gradient):
        return gradient

    def apply(self, gradient, scale):
        self.weights -= np.float32(RATE * scale) * gradient
        self.steps += 1

    def read_weights(self, out):
        np.copyto(out, self.weights)

    def write_weights(self, weights):
        self.weights = weights.copy()


def tokens_of(step, number):
    """Micro-batches of different lengths: means must be weighed."""
    return 3 + (step + 2 * number) % 4


def gradient_of(step, number, weights):
    """Of the summed loss of a micro-batch, a quadratic."""
    target = np.random.default_rng([step, number]).standard_normal(P).astype(np.float32)
    return np.float32(tokens_of(step, number)) * (weights - target)


def plan(sync_every, **more):
    """Options of DiLoCo; with `MEAN` it is local SGD."""
    return DiLoCo.Options(sync_every=sync_every, **more)


def trained(comm, options, steps, strategy=None, inject_nan=None):
    """The replica and its strategy after some steps, and its weights after each."""
    mesh, replica, seen = Mesh(comm), Plain(), []
    leaves, blocks = leaves_of(M, mesh)
    mine, made = blocks[comm.rank], order(leaves, blocks)
    strategy = set_up(strategy or DiLoCo(options), comm, replica, mine, M)
    sums = BlockSum(P, leaves, mine)
    for step in range(steps):
        totals = Totals(M)
        for number in mine:
            gradient = gradient_of(step, number, replica.weights)
            if inject_nan == (comm.rank, step):
                gradient[3] = np.nan
            sums.add(gradient)
            totals.add(number, np.array([1.0, tokens_of(step, number), 0.0]))
        take_step(strategy, sums.terms(), made, totals, 0.0, replica, mesh, step)
        seen.append(replica.weights.copy())
    return replica, strategy, seen


def by_hand(options, steps, ranks):
    """The weights of all ranks after each step, (steps, R, P), in float64."""
    blocks = [share(M, rank, ranks) for rank in range(ranks)]
    met = BEGIN.astype(np.float64)
    momentum, here = np.zeros(P), [met.copy() for _ in range(ranks)]
    seen_tokens, found, outer, left = np.zeros(ranks), [], np.zeros(P), list(here)
    for step in range(steps):
        for r, block in enumerate(blocks):
            count = sum(tokens_of(step, i) for i in block)
            total = sum(gradient_of(step, i, here[r]) for i in block)
            here[r] = here[r] - RATE * total / count
            seen_tokens[r] += count
        leaves = (step + 1) % options.sync_every == 0
        arrives = (
            step + 1 - options.outer_delay > 0 and (step + 1 - options.outer_delay) % options.sync_every == 0
        )
        for now in ("arrives", "leaves") if options.outer_delay else ("leaves", "arrives"):
            if now == "leaves" and leaves:
                weights = seen_tokens / seen_tokens.sum()
                outer = sum(w * (met - one) for w, one in zip(weights, here, strict=True))
                left, seen_tokens = [one.copy() for one in here], np.zeros(ranks)
            if now == "arrives" and arrives:
                momentum = options.outer_momentum * momentum + outer
                met = met - options.outer_lr * (outer + options.outer_momentum * momentum)
                here = [met + one - then for one, then in zip(here, left, strict=True)]
        found.append(np.stack(here))
    return np.stack(found)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_meeting_after_every_step_is_synchronous_sgd(ranks):
    """DiLoCo with H = 1, outer rate 1, no momentum and SGD inside: every rank's tokens count alike."""
    local = on_ranks(ranks, lambda comm: trained(comm, plan(1, **MEAN), 6)[2][-1])
    synchronous = on_ranks(ranks, lambda comm: trained(comm, None, 6, AllReduce())[2][-1])
    for one in local:
        np.testing.assert_allclose(one, synchronous[0], atol=2e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        plan(3, **MEAN), plan(2), plan(4, outer_lr=0.5, outer_momentum=0.0),
        plan(3, outer_delay=1, **MEAN), plan(3, outer_delay=2), plan(2, outer_momentum=0.5, outer_delay=2),
    ],
)  # fmt: skip
def test_all_that_replicas_do_between_meetings_and_at_them(ranks, options):
    steps = 9
    found = np.array(on_ranks(ranks, lambda comm: trained(comm, options, steps)[2]))
    np.testing.assert_allclose(found.transpose(1, 0, 2), by_hand(options, steps, ranks), atol=2e-5)
    for step in range(steps):
        equal = all(np.array_equal(found[0, step], one[step]) for one in found)
        meet = (step + 1) % options.sync_every == 0 and not options.outer_delay
        assert equal == (ranks == 1 or meet)


def test_synchronous_steps_come_first():
    options = plan(3, sync_warmup_steps=4, **MEAN)
    found = on_ranks(R, lambda comm: trained(comm, options, 7)[2])
    synchronous = on_ranks(R, lambda comm: trained(comm, None, 4, AllReduce())[2])
    for one in found:
        np.testing.assert_array_equal(one[:4], synchronous[0])
    assert not np.array_equal(found[0][5], found[1][5])
    np.testing.assert_array_equal(found[0][6], found[1][6])


@pytest.mark.parametrize(("options", "meetings"), [(plan(100), 1), (plan(4, outer_delay=3), 2)])
def test_all_can_meet_ahead_of_time(options, meetings):
    def work(comm):
        replica, strategy, _ = trained(comm, options, 5)
        assert not strategy.in_sync
        strategy.synchronize(replica, Mesh(comm))
        assert strategy.in_sync and strategy.meetings == meetings
        before = replica.weights.copy()
        strategy.synchronize(replica, Mesh(comm))  # nothing is left to do
        assert np.array_equal(before, replica.weights)
        return replica.weights

    found = on_ranks(R, work)
    assert all(np.array_equal(found[0], one) for one in found)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_each_fragment_meets_once_in_every_stretch(every, fragments, warmup):
    fragments = min(fragments, every)
    options = plan(every, sync_warmup_steps=warmup, outer_fragments=fragments)
    steps = range(warmup + every + 1, warmup + 2 * every + 1)
    met = [[one for one in range(fragments) if options.due(one, step)] for step in steps]
    assert sorted(chain.from_iterable(met)) == list(range(fragments))
    assert max(map(len, met)) == 1  # never two at once: that is what they are for


def test_fragments_meet_by_turns():
    options = plan(4, outer_fragments=2, **MEAN)

    def work(comm):
        _, strategy, seen = trained(comm, options, 4)
        assert strategy.meetings == 2 and not strategy.in_sync
        return seen

    found = np.array(on_ranks(R, work))
    parts = (slice(P // 2), slice(P // 2, P))
    equal = [[np.array_equal(*found[:2, step, part]) for part in parts] for step in range(4)]
    assert equal == [[False, False], [False, True], [False, False], [True, False]]


def test_not_a_number_on_one_rank_stops_all_before_a_weight_has_changed():
    def work(comm):
        with pytest.raises(NumericError, match="no weight has changed"):
            trained(comm, plan(4), 3, inject_nan=(1, 0))
        return True

    assert on_ranks(R, work) == [True] * R


# bfloat16 -------------------------------------------------------------------------------------------


def test_rounding_is_to_the_nearest():
    values = np.float32([1.0, 1.00390625, 1.01171875, -3.3, 1e-40, np.inf, np.nan, 3.4e38])
    bits = np.empty(values.size, np.uint16)
    to_bfloat16(values, bits)
    back = from_bfloat16(bits)
    np.testing.assert_array_equal(back, values.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert abs(back[3] - values[3]) <= abs(values[3]) / 256


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 17, 1000])
def test_short_sums(ranks, length):
    terms = [np.random.default_rng(r).standard_normal(length).astype(np.float32) for r in range(ranks)]

    def work(comm):
        array = terms[comm.rank].copy()
        allreduce_bfloat16(comm, array)
        return array

    found = on_ranks(ranks, work)
    assert all(one.tobytes() == found[0].tobytes() for one in found)
    short = [term.astype(ml_dtypes.bfloat16).astype(np.float32) for term in terms]
    total = short[0]
    for one in short[1:]:
        total = total + one
    np.testing.assert_array_equal(found[0], total.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_meetings_in_bfloat16():
    options = plan(3, outer_precision="bfloat16")
    found = on_ranks(R, lambda comm: trained(comm, options, 6)[2])
    assert all(np.array_equal(found[0][-1], one[-1]) for one in found)
    exact = on_ranks(R, lambda comm: trained(comm, plan(3), 6)[2])
    change = np.abs(exact[0][-1] - BEGIN).max()
    assert 0 < np.abs(found[0][-1] - exact[0][-1]).max() < change / 50
