"""Elastic averaging and gossip on ranks as threads, at different paces: what no message may change."""

import time

import numpy as np
import pytest
from stepping import set_up, take_step
from test_local_sgd import BEGIN, RATE, M, P, Plain, gradient_of, tokens_of
from thread_comm import on_ranks

from tf_dist.errors import LaunchError
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.reduction_tree import BlockSum, order
from tf_dist.parallel.totals import Totals
from tf_dist.strategies import EASGD, Gossip, waiting

ONE = order(range(1), [range(1)])


def ready(strategy, comm, replica):
    """The strategy on this rank, and a replica that may skip a step."""
    replica.skip = lambda: None
    return set_up(strategy, comm, replica, strategy.assignment(M, Mesh(comm)), M)


def trained(comm, strategy, steps, slow=(), limit=None):
    """The replica after some steps at this rank's pace, and after all have met."""
    replica, mesh = Plain(), Mesh(comm)
    mine = ready(strategy, comm, replica).context.micro_batches
    sums = BlockSum(P, mine or range(M), mine)
    for step in range(steps):
        totals = Totals(M)
        for number in mine:
            sums.add(gradient_of(step, number, replica.weights))
            totals.add(number, np.array([1.0, tokens_of(step, number), 0.0]))
        if comm.rank in slow:
            time.sleep(0.01)
        terms = sums.terms() if mine else []
        take_step(strategy, terms, ONE, totals, 0.0, replica, mesh, step, limit or steps)
    strategy.settle(replica)
    before = replica.weights.copy()
    strategy.synchronize(replica, mesh)
    assert strategy.in_sync
    return before, replica.weights


def elastic(every=2, force=0.3, trains=False):
    return EASGD(sync_every=every, elastic_force=force, master_trains="on" if trains else "off")


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("slow", [(), (1,), (0,)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_go_on_from_the_centre(ranks, slow, trains):
    found = on_ranks(ranks, lambda comm: trained(comm, elastic(trains=trains), 7, slow))
    centres = [after for _, after in found]
    assert all(np.array_equal(centres[0], one) for one in centres)
    assert np.abs(centres[0] - BEGIN).max() > 0.01


def test_a_worker_and_the_centre_move_towards_each_other():
    """One worker: every exchange by hand."""
    (_, centre), (worker, _) = on_ranks(2, lambda comm: trained(comm, elastic(2, 0.3), 6))
    w, c = BEGIN.astype(np.float64), BEGIN.astype(np.float64)
    for step in range(6):
        tokens = sum(tokens_of(step, i) for i in range(M))
        w = w - RATE * sum(gradient_of(step, i, w) for i in range(M)) / tokens
        if step % 2:
            moved = 0.3 * (w - c)
            w, c = w - moved, c + moved
    np.testing.assert_allclose(centre, c, atol=1e-5)
    np.testing.assert_allclose(worker, w, atol=1e-5)


def test_the_master_knows_all_losses_when_all_have_met():
    seen = []

    def work(comm):
        replica, mesh = Plain(), Mesh(comm)
        strategy = ready(elastic(3), comm, replica)
        for step in range(5):
            totals, terms = Totals(M), []
            for number in strategy.context.micro_batches:
                terms = [gradient_of(step, number, replica.weights)]
                totals.add(number, np.array([1.0, tokens_of(step, number), 0.0]))
            take_step(strategy, terms, ONE, totals, 0.0, replica, mesh, step, 5)
            if comm.rank == 0:
                seen.append(totals.sum())
        strategy.synchronize(replica, mesh)

    on_ranks(3, work)
    counts = np.sum(seen, axis=0)
    assert counts[0] == 5 * M
    assert counts[1] == sum(tokens_of(step, number) for step in range(5) for number in range(M))


@pytest.mark.parametrize("slow", [(), (1,)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_gossip_ends_in_one_model(ranks, slow):
    def work(comm):
        strategy = Gossip()
        return *trained(comm, strategy, 20, slow), strategy.mixed, strategy.share

    found = on_ranks(ranks, work)
    assert all(np.array_equal(found[0][1], after) for _, after, *_ in found)
    assert sum(mixed for *_, mixed, _ in found) > (3 if ranks > 1 else -1)
    assert sum(share for *_, share in found) == pytest.approx(1.0)


def test_gossip_changes_no_mean():
    """Without gradients: ranks begin with other weights, and the mean of all stays what it was."""
    begin = [np.random.default_rng(rank).standard_normal(P).astype(np.float32) for rank in range(4)]

    def work(comm):
        replica, mesh = Plain(), Mesh(comm)
        strategy = ready(Gossip(), comm, replica)
        replica.weights = begin[comm.rank].copy()
        for step in range(30):
            take_step(strategy, [], ONE, Totals(M), 0.0, replica, mesh, step)
            time.sleep(0.002)
        strategy.settle(replica)
        spread = replica.weights.copy()
        strategy.synchronize(replica, mesh)
        return spread, replica.weights

    found = on_ranks(4, work)
    mean = np.mean(begin, axis=0)
    for _, after in found:
        np.testing.assert_allclose(after, mean, atol=1e-5)
    apart = np.mean([np.abs(spread - mean) for spread, _ in found])
    assert apart < 0.5 * np.mean([np.abs(one - mean) for one in begin])


def test_nobody_waits_for_ever(monkeypatch):
    monkeypatch.setattr(waiting, "patience_s", lambda: 0.05)
    with pytest.raises(LaunchError, match="nothing was heard of ranks 1, 3"):
        waiting.wait_until(lambda: False, lambda: False, lambda: [1, 3])
