"""Compressed gradients over real ranks: the same weights everywhere, fewer bytes, and runs that go on."""

import warnings

import numpy as np
import pytest
from mpi4py import MPI
from test_training_mpi import flat, refused_everywhere, steps_of, trainer

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import NumericError, UsageError
from tf_dist.parallel.compress import BFloat16, OneBit, PowerSGD, TopK
from tf_dist.parallel.mesh import Mesh
from tf_dist.strategies import Compressed, DiLoCo

N = MPI.COMM_WORLD.size
KINDS = {
    "bf16": {},
    "topk": {"compression_density": 0.1},
    "powersgd": {"compression_rank": 2, "compression_least_rate": 1.5},
    "onebit": {"compression_start": 2},
}
pytestmark = [
    pytest.mark.ranks(3),
    pytest.mark.filterwarnings("ignore:.*it costs more than it saves"),
    # The laws, also for one rank: tests/parallel/test_compress.py.
]


def compressed(comm, kind, **more):
    return trainer(comm, compression={"compression": kind, **KINDS[kind], **more})


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_the_same_weights_and_learn(connected, everyone, kind):
    trained = compressed(connected, kind)
    logs = steps_of(trained, 8)
    assert everyone(logs) == [everyone(logs)[0]] * N
    assert len(set(everyone(flat(trained.model).tobytes()))) == 1
    plain = steps_of(trainer(SerialComm()), 8)
    assert logs[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-6)
    assert logs[-1]["loss"] == pytest.approx(plain[-1]["loss"], abs=0.05)
    trained.check_equal()


@pytest.mark.parametrize(("kind", "least"), [("bf16", 1.9), ("topk", 4.0), ("powersgd", 1.8)])
def test_fewer_bytes_travel(connected, everyone, kind, least):
    sent = []
    for made in (trainer(connected, allreduce="messages"), compressed(connected, kind)):
        steps_of(made, 1)
        before = connected.sent_bytes
        steps_of(made, 4)
        sent.append(sum(everyone(connected.sent_bytes - before)))
    few = 4 * N * 2 * 8 * (4 * 5 + 2)  # losses and counts
    if kind == "topk":  # all ranks get what all others send
        least *= 2 / N
    assert sent[0] - few > least * (sent[1] - few)
    assert "stayed behind" in made.strategy.report().text


@pytest.mark.parametrize(
    "kind", [kind if kind == "powersgd" else pytest.param(kind, marks=pytest.mark.extended) for kind in KINDS]
)
def test_a_run_that_goes_on_is_one_that_was_never_stopped(connected, one_folder, everyone, kind):
    from tf_dist.training import state_dict

    first = compressed(connected, kind)
    steps_of(first, 3)
    state_dict.save(first, one_folder, 1, {})
    logs = steps_of(first, 3)
    second = trainer(connected, seed=2, compression={"compression": kind, **KINDS[kind]})
    state_dict.restore(second, one_folder / "step-00000003")
    assert steps_of(second, 3) == logs
    assert all(everyone(flat(first.model).tobytes() == flat(second.model).tobytes()))
    other = trainer(connected, seed=3)  # without compression
    state_dict.restore(other, one_folder / "step-00000003")
    steps_of(other, 1)


def local(connected, compressor=None, start=0, **more):
    inner = DiLoCo(sync_every=2, **more)
    strategy = inner if compressor is None else Compressed(inner, compressor, start=start)
    return trainer(connected, strategy)


def test_outer_gradients_that_are_all_sent_are_those_of_diloco(connected, everyone):
    plain, whole = local(connected), local(connected, TopK(density=1.0))
    assert steps_of(plain, 5) == steps_of(whole, 5)
    assert plain.check_equal() == whole.check_equal()


@pytest.mark.parametrize(
    "compressor", [BFloat16, lambda: TopK(density=0.1), lambda: PowerSGD(rank=2), OneBit]
)
def test_compressed_outer_gradients_are_alike_and_learn(connected, everyone, compressor):
    trained = local(connected, compressor())
    logs = steps_of(trained, 8)
    assert trained.strategy.in_sync and trained.strategy.spent.sums == 4
    assert len(set(everyone(flat(trained.model).tobytes()))) == 1
    assert logs[-1]["loss"] == pytest.approx(steps_of(local(connected), 8)[-1]["loss"], abs=0.1)
    assert trained.strategy.compressor.residual.any()


def test_compressed_outer_gradients_go_on_from_a_checkpoint(connected, one_folder, everyone):
    from tf_dist.training import state_dict

    first = local(connected, PowerSGD(rank=2), start=2)
    steps_of(first, 5)
    state_dict.save(first, one_folder, 1, {})
    logs = steps_of(first, 3)
    second = local(connected, PowerSGD(rank=2), start=2)
    state_dict.restore(second, one_folder / "step-00000005")
    assert steps_of(second, 3) == logs
    assert first.check_equal() == second.check_equal()


def test_an_outer_gradient_that_is_no_number_stops_all(connected, everyone):
    trained = local(connected, TopK(density=0.5))
    steps_of(trained, 1)
    if connected.rank == N - 1:
        weight = trained.model.trainable_weights[-1]
        weight.assign(np.full(weight.shape, np.inf, np.float32))
    with pytest.raises(NumericError, match="weights have changed by what is not finite"):
        trained.synchronize()
    assert np.isfinite(trained.strategy.compressor.residual).all()


def test_the_first_steps_are_whole(connected, everyone):
    trained = compressed(connected, "topk", compression_start=3)
    assert steps_of(trained, 3) == steps_of(trainer(SerialComm()), 3)
    assert not trained.strategy.spent.sums
    steps_of(trained, 1)
    assert trained.strategy.spent.sums == 1


def test_not_a_number_on_one_rank_stops_all(connected, everyone):
    trained = compressed(connected, "topk")
    steps_of(trained, 1)
    if connected.rank == N - 1:
        weight = trained.model.weights[-1]
        weight.assign(np.full(weight.shape, np.nan, np.float32))
    before = flat(trained.model), trained.strategy.compressor.residual.copy()
    trained.consistency_check.watch = lambda step: None  # it would be the first to see this
    assert "not finite" in refused_everywhere(trained, everyone)
    after = flat(trained.model), trained.strategy.compressor.residual
    assert all(everyone(all(map(np.array_equal, before, after)) or connected.rank == N - 1))


@pytest.mark.parametrize(("compressed_ms", "warned"), [(2.0, True), (0.5, False)])
def test_what_costs_more_than_it_saves_is_said(connected, monkeypatch, compressed_ms, warned):
    """The times themselves are a clock's, and may be any on a busy machine."""
    from tf_dist.strategies import compressed as compression

    took = {"compressed_ms": compressed_ms, "plain_ms": 1.0}
    monkeypatch.setattr(compression, "tried", lambda compressor, comm: took)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compressed(connected, "powersgd")
    found = ["costs more than it saves here" in str(one.message) for one in said]
    assert any(found) is (warned and connected.rank == 0)


def test_what_cannot_be_is_refused(connected):
    with pytest.raises(UsageError, match="no weight would become"):
        trainer(connected, compression={"compression": "powersgd", "compression_rank": 1000})
    with pytest.raises(UsageError, match="only sums of strategies allreduce"):
        trainer(connected, "master", compression={"compression": "bf16"})
    if N % 2 == 0:
        with pytest.raises(UsageError, match="only sums of strategies allreduce"):
            trainer(connected, mesh=Mesh(connected, sequence=2), compression={"compression": "bf16"})
