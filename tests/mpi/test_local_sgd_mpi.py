"""Local SGD and DiLoCo over real ranks: they meet, save, go on, and what must be equal is watched."""

import numpy as np
import pytest
from conftest import made
from mpi4py import MPI
from test_grid_mpi import trainer as on_grid
from test_training_mpi import HELD_OUT, TOKENS, flat, refused_everywhere, steps_of, trainer

from tf_dist.errors import LaunchError, UsageError
from tf_dist.parallel.bf16_allreduce import allreduce_bfloat16

pytestmark = pytest.mark.ranks(3)

N = MPI.COMM_WORLD.size
several = pytest.mark.skipif(N == 1, reason="one rank has nobody to meet")


def equal(everyone, trained):
    return len(set(everyone(flat(trained.model).tobytes()))) == 1


@pytest.mark.parametrize("update", ["local-sgd", "diloco"])
def test_ranks_part_and_meet(connected, everyone, update):
    trained = trainer(connected, update, local={"sync_every": 3})
    found = []
    for _ in range(6):
        logs = steps_of(trained, 1)
        assert everyone(logs) == [everyone(logs)[0]] * N, "the ranks were told different things"
        found.append(equal(everyone, trained))
    assert found == [N == 1, N == 1, True] * 2
    assert "meet every 3 steps" in trained.arrangement.description


def test_it_learns(connected, everyone):
    # DiLoCo's outer Nesterov momentum makes steps several times larger: on one rank 1e-2 diverges.
    trained = trainer(connected, "diloco", rate=3e-3, local={"sync_every": 4})
    before = trained.validate(HELD_OUT)["val_loss"]
    history = trained.fit(TOKENS[:200] % 5, steps=60, validation=TOKENS[200:260] % 5, eval_every=30)
    assert history["val_loss"][-1] < before - 0.5
    assert everyone(history) == [everyone(history)[0]] * N
    assert equal(everyone, trained)


@several
@pytest.mark.parametrize("every", [1, 5])
def test_gradients_stay_at_home(connected, everyone, every):
    """Of the weights 2 (R - 1) / R travel at a meeting, and a few numbers in every step."""
    comm = made("mpi", connected)  # one without a window, in which meetings of this size would send nothing
    trained = trainer(comm, "local-sgd", local={"sync_every": every})
    steps_of(trained, 5)
    before = comm.sent_bytes
    steps_of(trained, 5)
    sent = sum(everyone(comm.sent_bytes - before)) / N
    weights = 2 * (N - 1) / N * 4 * trained.replica.parameters
    few = 5 * 2 * 8 * (4 * 5 + 2)
    assert 5 // every * weights <= sent <= 5 // every * weights + few


@several
def test_short_changes_are_half_the_bytes(connected, everyone):
    array = np.random.default_rng(connected.rank).standard_normal(10_000).astype(np.float32)
    before = connected.sent_bytes
    allreduce_bfloat16(connected, array)
    sent = sum(everyone(connected.sent_bytes - before))
    assert sent == 4 * (N - 1) * array.size
    assert len(set(everyone(array.tobytes()))) == 1


@pytest.mark.skipif(N not in (1, 3), reason="one and three ranks show it")
@pytest.mark.parametrize(  # between meetings, at one, and while something travels
    ("stop", "fragments", "delay"),
    [
        pytest.param(2, 1, 0, marks=pytest.mark.extended),
        (3, 1, 0),
        pytest.param(4, 2, 0, marks=pytest.mark.extended),
        (4, 1, 2),
    ],
)
def test_a_run_that_goes_on_is_one_that_was_never_stopped(
    connected, one_folder, everyone, stop, fragments, delay
):
    from tf_dist.training import state_dict

    local = {"sync_every": 3, "outer_fragments": fragments, "outer_delay": delay}
    first = trainer(connected, "diloco", local=local)
    steps_of(first, stop)
    state_dict.save(first, one_folder, 1, {})
    assert equal(everyone, first)
    logs = steps_of(first, 5)
    second = trainer(connected, "diloco", seed=2, local=local)
    state_dict.restore(second, one_folder / f"step-{stop:08d}")
    assert steps_of(second, 5) == logs
    second.synchronize()
    first.synchronize()
    assert all(everyone(flat(first.model).tobytes() == flat(second.model).tobytes()))


@pytest.mark.parametrize(
    ("local", "said"), [({"outer_delay": 9}, "at most 8 steps"), ({"outer_fragments": 9}, "most 8")]
)
def test_what_does_not_fit_between_meetings(connected, local, said):
    with pytest.raises(UsageError, match=said):
        trainer(connected, "local-sgd", local=local)


@pytest.mark.skipif(N not in (1, 3), reason="one and three ranks show it")
@pytest.mark.parametrize("fragments", [pytest.param(1, marks=pytest.mark.extended), 3])
def test_what_travels_meanwhile_has_the_bits_of_what_is_waited_for(ranks, everyone, fragments, monkeypatch):
    local = {"sync_every": 6, "outer_fragments": fragments, "outer_delay": 2}
    found = []
    for travels in (True, False):
        if not travels:
            monkeypatch.setattr(ranks, "overlapped", lambda *_, **more: None)
        before = ranks.overlapped_sums
        trained = trainer(ranks, "diloco", local=local)
        logs = steps_of(trained, 13)
        trained.synchronize()
        found.append((logs, flat(trained.model).tobytes()))
        # With one fragment one has arrived, and one leaves and is met; with three two times as many and more.
        assert (ranks.overlapped_sums - before > fragments) == travels
    assert found[0] == found[1]
    assert len(set(everyone(found[0][1]))) == 1


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("diloco", "allreduce"),
        pytest.param("allreduce", "diloco", marks=pytest.mark.extended),
    ],
)
def test_a_run_may_go_on_with_another_update(connected, one_folder, before, after):
    from tf_dist.training import state_dict

    first = trainer(connected, before)
    steps_of(first, 2)
    state_dict.save(first, one_folder, 1, {})
    second = trainer(connected, after, seed=2)
    state_dict.restore(second, one_folder / "step-00000002")
    assert (flat(first.model) == flat(second.model)).all()
    steps_of(second, 1)


@several
def test_a_rank_that_differs_after_a_meeting_is_named(connected, everyone):
    trained = trainer(connected, "diloco", local={"sync_every": 2}, check_every=2)
    steps_of(trained, 2)
    if connected.rank == N - 1:
        weight = trained.model.weights[0]
        weight.assign(weight + np.float32(1e-3))
    with pytest.raises(LaunchError, match=f"rank {N - 1}"):
        steps_of(trained, 1)


@several
def test_not_a_number_on_one_rank_stops_all(connected, everyone):
    trained = trainer(connected, "diloco", local={"sync_every": 4})
    steps_of(trained, 1)
    if connected.rank == N - 1:
        weight = trained.model.weights[-1]
        weight.assign(np.full(weight.shape, np.nan, np.float32))
    before = flat(trained.model)
    assert "not finite" in refused_everywhere(trained, everyone)
    assert all(everyone(flat(trained.model).tobytes() == before.tobytes()))


@pytest.mark.ranks(2)
@pytest.mark.skipif(N != 2, reason="a replica of two ranks shows it")
@pytest.mark.parametrize("axis", ["tensor", pytest.param("pipeline", marks=pytest.mark.extended)])
def test_a_replica_of_several_ranks(connected, everyone, axis):
    """A grid of two ranks computes what one rank that is a replica computes."""
    local = {"sync_every": 2}
    trained = on_grid(connected, **{axis: 2}, update="diloco", local=local)
    logs = steps_of_grid(trained, 4)
    assert everyone(logs) == [logs] * N
    trained.check_equal()
    from tf_dist.comm.transport.base import SerialComm

    alone = steps_of_grid(on_grid(SerialComm(), update="diloco", local=local), 4)
    for mine, theirs in zip(logs, alone, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def steps_of_grid(trained, count):
    from test_grid_mpi import steps_of as steps

    return steps(trained, count)


@pytest.mark.ranks(2)
@pytest.mark.skipif(N not in (2, 4), reason="rows are shared by two or four")
def test_shared_rows_are_refused(connected):
    with pytest.raises(UsageError, match="share rows"):
        on_grid(connected, sequence=2, update="local-sgd")


def test_over_horovod(connected, carried, everyone):
    trained = trainer(carried, "local-sgd", local={"sync_every": 2})
    steps_of(trained, 2)
    weights = everyone(flat(trained.model))
    assert max(float(np.abs(one - weights[0]).max()) for one in weights) <= 1e-6
