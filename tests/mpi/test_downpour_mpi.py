"""A master and its workers: with no staleness the bits of allreduce, with some the same losses nearly."""

import time

import numpy as np
import pytest
from mpi4py import MPI
from test_training_mpi import HELD_OUT, TOKENS, flat, steps_of, trainer

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError

pytestmark = pytest.mark.ranks(3)

N = MPI.COMM_WORLD.size
several = pytest.mark.skipif(N == 1, reason="one rank has no workers")


def downpour(comm, **options):
    more = {name: options.pop(name) for name in ("rows", "seed", "check_every", "rate") if name in options}
    return trainer(comm, "downpour", asynchrony=options, **more)


def same(everyone, trained):
    return len(set(everyone(flat(trained.model).tobytes()))) == 1


@pytest.mark.parametrize("trains", ["on", "off"])
@pytest.mark.parametrize(
    "rows", [pytest.param(1, marks=pytest.mark.extended), 3, 4]
)  # 12, 4, 3 micro-batches
def test_no_staleness_is_allreduce_to_the_bit(connected, everyone, trains, rows):
    alone = trainer(SerialComm(), rows=rows)
    expected = steps_of(alone, 6)
    trained = downpour(connected, staleness=0, master_trains=trains, rows=rows)
    logs = steps_of(trained, 6)
    assert logs == expected
    trained.synchronize()
    assert all(everyone(bool((flat(trained.model) == flat(alone.model)).all())))
    if trained.comm.rank == 0:
        assert set(trained.strategy.load.staleness) == {0}


@pytest.mark.parametrize("trains", ["on", "off"])
@pytest.mark.parametrize("staleness", [1, 4])
def test_it_learns_and_all_are_told_the_same(connected, everyone, staleness, trains):
    trained = downpour(connected, staleness=staleness, master_trains=trains)
    before = trained.validate(HELD_OUT)["val_loss"]
    history = trained.fit(TOKENS[:200] % 5, steps=60, validation=TOKENS[200:260] % 5, eval_every=30)
    assert history["val_loss"][-1] < before - 0.5
    assert everyone(history) == [everyone(history)[0]] * N
    assert same(everyone, trained)
    assert len(set(everyone((trained.step, trained.tokens)))) == 1
    report = trained.strategy.load.report()
    if connected.rank == 0:
        assert sum(report["staleness"].values()) == report["updates"] <= 60 * trained.strategy.units.units
        assert 0 < report["master_load"] <= 1


@several
def test_a_slow_worker_takes_fewer_units(connected, everyone):
    """With a batch in four units or more the others do what it does not; a bound of one batch is kept."""
    trained = downpour(connected, staleness=1, rows=1)
    done = []
    compute = trained.strategy.units.gradient

    def slowly(unit, *arguments):
        done.append(unit)
        time.sleep(0.05 if connected.rank == N - 1 else 0.0)
        return compute(unit, *arguments)

    trained.strategy.units.gradient = slowly
    trained.last_step = 8
    steps_of(trained, 8)
    counts = everyone(len(done))
    assert sum(counts) == 8 * trained.strategy.units.units and counts[0] == 0
    if N > 2:
        assert counts[-1] < min(counts[1:-1])


@several
def test_one_rank_s_wish_to_stop_stops_all_at_one_step(connected, everyone):
    import keras

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if connected.rank == N - 1 and batch == 4:
                trained.request_stop()

    trained = downpour(connected, staleness=2)
    trained.fit(TOKENS, steps=40, callbacks=[Stop()])
    steps = everyone(trained.step)
    assert len(set(steps)) == 1 and 5 <= steps[0] <= 9
    assert same(everyone, trained)
    trained.fit(TOKENS, steps=3)  # and goes on
    assert everyone(trained.step) == [steps[0] + 3] * N


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_goes_on_from_a_checkpoint(connected, one_folder, everyone, staleness):
    from tf_dist.training import state_dict

    first = downpour(connected, staleness=staleness)
    steps_of(first, 3)
    state_dict.save(first, one_folder, 1, {})
    assert int(first.optimizer.iterations) == 3
    second = downpour(connected, staleness=staleness, seed=2)
    state_dict.restore(second, one_folder / "step-00000003")
    assert all(everyone(bool((flat(first.model) == flat(second.model)).all())))
    logs = steps_of(second, 2)
    assert second.step == 5 and everyone(logs) == [everyone(logs)[0]] * N
    if staleness == 0:
        assert logs == steps_of(first, 2)


def test_rates_follow_batches(connected, everyone):
    """With a schedule; and a callback may set a number."""
    import keras

    schedule = keras.optimizers.schedules.PolynomialDecay(1e-2, 10, 1e-3)
    trained = downpour(connected, staleness=1, rate=schedule)
    steps_of(trained, 5)
    if connected.rank == 0:
        assert float(trained.optimizer.learning_rate) == pytest.approx(float(schedule(5)))
    plain = downpour(connected, staleness=1)
    plain.optimizer.learning_rate = 0.5
    steps_of(plain, 1)
    if connected.rank == 0:
        assert float(plain.optimizer.learning_rate) == pytest.approx(0.5)


def test_stale_gradients_may_count_less(connected, everyone):
    trained = downpour(connected, staleness=3, staleness_aware="on")
    trained.last_step = 6
    assert np.isfinite([log["loss"] for log in steps_of(trained, 6)]).all()
    trained.last_step = 0
    trained.check_equal()


@several
def test_a_rank_that_differs_after_all_have_met_is_named(connected):
    trained = downpour(connected, check_every=2)
    steps_of(trained, 2)
    trained.synchronize()
    if connected.rank == N - 1:
        weight = trained.model.weights[0]
        weight.assign(weight + np.float32(1e-3))
    with pytest.raises(LaunchError, match=f"rank {N - 1}"):
        steps_of(trained, 1)
