"""Gradients that leave during the backward pass: the bits of those that do not, and nobody hangs."""

import numpy as np
import pytest
from conftest import from_rank_0, made
from mpi4py import MPI
from test_shared_memory_mpi import leaf, whole
from test_training_mpi import G, flat, refused_everywhere, steps_of, trainer

from tf_dist.comm.transport.base import SerialComm
from tf_dist.data.sampler import share
from tf_dist.errors import LaunchError
from tf_dist.parallel import buckets
from tf_dist.parallel.reduction_tree import BlockSum, order

pytestmark = pytest.mark.ranks(4)

STEPS = 6
ROWS = [1, 2, 3, 4, G]  # 12, 6, 4, 3 micro-batches and one: also ranks with none, and uneven ones
several = pytest.mark.skipif(MPI.COMM_WORLD.size == 1, reason="one rank has nobody to send to")


@pytest.fixture
def small_buckets(monkeypatch):
    """Several buckets, also of a small model."""
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 600)
    monkeypatch.setattr(buckets, "LAST_BUCKET_BYTES", 100)


@pytest.fixture(scope="module")
def serial(connected):
    """Logs and weights of the same training on one rank, by rows of a micro-batch; made when asked for."""
    found = {}

    def alone(rows):
        made = trainer(SerialComm(), rows=rows)
        return steps_of(made, STEPS), flat(made.model)

    def find(rows):
        if rows not in found:
            found[rows] = from_rank_0(lambda: alone(rows))
        return found[rows]

    return find


@several
@pytest.mark.parametrize("window", [True, False])
@pytest.mark.parametrize("leaves", [1, 3, 4, 8])
def test_parts_have_the_bits_of_one_rank(ranks, everyone, leaves, window):
    length, wrong = 10_007, []
    blocks = [share(leaves, rank, ranks.size) for rank in range(ranks.size)]
    mine, order_ = blocks[ranks.rank], order(range(leaves), blocks)
    ranks.forget_buffers(length, order_)
    ranks._overlaps.clear()
    home = ranks.term_buffers(length, order_) if window else None
    sums = BlockSum(length, range(leaves), mine, home)
    exchange = ranks.overlapped(length, order_)
    ranks.chunk_bytes = 1000
    for turn in range(3):
        for number in mine[:-1]:
            sums.add(leaf(number, turn, length))
        exchange.begin(sums.open_last())
        for start in range(0, length, 3001):
            part = slice(start, min(length, start + 3001))
            if mine:
                sums.add_part(start, leaf(mine[-1], turn, length)[part])
            exchange.ready(part)
        terms = sums.terms()
        ranks.barrier()
        found = ranks.allreduce_terms(terms, order_, terms[0] if terms else np.empty(length, np.float32))
        if found.array.tobytes() != whole(leaves, turn, length).tobytes():
            wrong.append(turn)
    assert everyone(wrong) == [[]] * ranks.size
    assert ranks.overlapped_sums >= 3 and ranks.under_way_s > 0


@several
@pytest.mark.parametrize(
    "rows", [pytest.param(n, marks=[pytest.mark.extended] * (n in (2, 4))) for n in ROWS]
)
@pytest.mark.parametrize("allreduce", ["messages", "window"])
def test_a_trainer_has_the_bits_of_one_rank(connected, serial, everyone, small_buckets, rows, allreduce):
    logs_serial, weights_serial = serial(rows)
    trained = trainer(connected, rows=rows, overlap="on", allreduce=allreduce, chunk_bytes=256)
    logs = steps_of(trained, STEPS)
    same = logs == logs_serial and (flat(trained.model) == weights_serial).all()
    assert all(everyone(bool(same)))
    assert "gradients leave during the backward pass, in " in trained.runner.said
    assert "in pieces of 0.25 KiB, as was asked for" in trained.arrangement.description


@several
def test_what_is_sent_is_counted(ranks, everyone, small_buckets):
    """Early or late: each node sends the others what it could not add alone, and its slice of the sum."""
    nodes, found = ranks.nodes(), []
    for overlap in ("on", "off"):
        trained = trainer(ranks, overlap=overlap, allreduce="window")
        steps_of(trained, 1)
        before = ranks.sent_bytes
        steps_of(trained, 1)
        found.append(sum(everyone(ranks.sent_bytes - before)))
    of_gradients = 4 * trained.replica.parameters * (nodes - 1)
    assert found[0] == pytest.approx(found[1], rel=0.02)
    assert found[0] >= 2 * of_gradients


@several
def test_over_nodes_it_is_the_default(ranks, serial, everyone, small_buckets):
    logs_serial, weights_serial = serial(3)
    trained = trainer(ranks)
    logs = steps_of(trained, STEPS)
    same = logs == logs_serial and (flat(trained.model) == weights_serial).all()
    assert all(everyone(bool(same)))
    assert trained.runner.overlap.active == (ranks.nodes() > 1)


@several
def test_trainers_take_turns(connected, serial, everyone, small_buckets):
    """Of one size, on one Comm: in a window, by messages, and one whose gradients do not leave early."""
    kinds = [("window", "on"), ("messages", "on"), ("messages", "off")]
    trained = [trainer(connected, allreduce=allreduce, overlap=overlap) for allreduce, overlap in kinds]
    logs = [[steps_of(one, 1)[0] for one in trained] for _ in range(STEPS)]
    wanted = serial(3)[0]
    assert all(everyone(all(found == [step] * 3 for found, step in zip(logs, wanted, strict=True))))


@several
def test_in_debug_mode(connected, serial, everyone, small_buckets):
    """Every collective is compared, and the order of parts is one of them all the same."""
    trained = trainer(made("mpi in debug mode", connected), overlap="on")
    assert all(everyone(steps_of(trained, STEPS) == serial(3)[0]))


@several
def test_not_a_number_on_one_rank_stops_all(connected, everyone, small_buckets):
    trained = trainer(connected, overlap="on")
    steps_of(trained, 1)
    if connected.rank == connected.size - 1:
        weight = trained.model.weights[-1]
        weight.assign(np.full(weight.shape, np.nan, np.float32))
    before = flat(trained.model)
    trained.consistency_check.watch = lambda step: None  # asked only after a norm that is not finite
    found = refused_everywhere(trained, everyone)
    assert ("not finite" if connected.size == 1 else "no longer hold the same model") in found
    assert all(everyone(flat(trained.model).tobytes() == before.tobytes()))


@several
def test_xla_and_master_do_without(connected, serial, everyone):
    with pytest.raises(LaunchError, match="strategy master needs all of them at once"):
        trainer(connected, "master", overlap="on")
    trained = trainer(connected, overlap="on")
    trained.replica.use_xla(True)
    assert not trained.runner.overlap.active
    assert "because XLA compiles it" in trained.runner.said
    steps_of(trained, 1)
    trained.check_equal()
