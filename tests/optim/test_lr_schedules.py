"""Every schedule against its formula, in NumPy."""

import keras
import numpy as np
import pytest

from tf_dist.errors import UsageError
from tf_dist.optim.lr_schedules import OneCycle, Warmup, schedule

PEAK, END = 2e-3, 5e-4
NAMES = ("constant", "linear", "cosine", "1cycle")


def rates(made, steps):
    return np.array([float(made(step)) if callable(made) else made for step in steps])


def formula(name, step, steps, warmup):
    """The formulas of the documentation; ``step`` counts from 0."""
    if name == "1cycle":
        rise = 0.3 * steps
        if step < rise:
            return PEAK / 25 + (PEAK - PEAK / 25) * (1 - np.cos(np.pi * step / rise)) / 2
        t = min(1.0, (step - rise) / (steps - rise))
        return PEAK + (END - PEAK) * (1 - np.cos(np.pi * t)) / 2
    if step < warmup:
        return PEAK * (step + 1) / warmup
    t = min(1.0, (step - warmup) / (steps - warmup))
    return {
        "constant": PEAK,
        "linear": PEAK + (END - PEAK) * t,
        "cosine": END + (PEAK - END) * (1 + np.cos(np.pi * t)) / 2,
    }[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(40, 10), (40, 0), (17, 1)])
def test_values(name, steps, warmup):
    at = range(0, steps + 5)
    made = rates(schedule(name, steps, PEAK, END, warmup), at)
    np.testing.assert_allclose(made, [formula(name, step, steps, warmup) for step in at], rtol=1e-5)


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_peak_is_reached_at_the_end_of_the_warmup(name):
    made = rates(schedule(name, 40, PEAK, END, 10), range(40))
    assert made[0] == pytest.approx(PEAK / 10)
    assert made[9] == pytest.approx(PEAK)
    assert made[10] == pytest.approx(PEAK)
    assert made.argmax() in (9, 10)
    assert (np.diff(made[10:]) <= 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 20), (5, 20), (20, 20), (2, 1)])
def test_runs_as_short_as_their_warmup(name, steps, warmup):
    made = rates(schedule(name, steps, PEAK, END, warmup), range(steps + 2))
    assert np.isfinite(made).all()
    assert (made >= 0).all()
    assert (made <= PEAK * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", NAMES)
def test_no_rate_at_all(name):
    assert rates(schedule(name, 10, 0.0, 0.0, 2), range(10)).tolist() == [0.0] * 10


def test_constant_without_warmup_is_a_number():
    assert schedule("constant", 10, PEAK, END, 0) == PEAK


@pytest.mark.parametrize("name", NAMES)
def test_they_work_on_the_optimizers_counter(name):
    made = schedule(name, 10, PEAK, END, 3)
    counter = keras.Variable(4, dtype="int64", trainable=False)
    assert float(made(counter)) == pytest.approx(formula(name, 4, 10, 3), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_through_keras(name):
    made = schedule(name, 10, PEAK, END, 3)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(made))
    assert type(again) is type(made)
    assert again.get_config() == made.get_config()
    assert rates(again, range(12)).tolist() == rates(made, range(12)).tolist()


def test_round_trip_within_an_optimizer():
    optimizer = keras.optimizers.Adam(schedule("cosine", 10, PEAK, END, 3))
    again = keras.optimizers.Adam.from_config(optimizer.get_config())
    assert float(again.learning_rate) == float(optimizer.learning_rate) == pytest.approx(PEAK / 3)


def test_constructors_take_what_get_config_gives():
    cycle = OneCycle(PEAK, END, 10)
    assert OneCycle(**cycle.get_config()).get_config() == cycle.get_config()
    warmup = Warmup(PEAK, PEAK, 3)
    assert Warmup.from_config(warmup.get_config()).get_config() == warmup.get_config()


def test_unknown():
    with pytest.raises(UsageError, match="unknown schedule 'cosin': constant, linear, cosine, wsd or 1cycle"):
        schedule("cosin", 10, PEAK, END, 0)


def test_wsd_is_stable_and_then_falls_evenly():
    rates = [float(schedule("wsd", 100, PEAK, END, 10, 0.2)(step)) for step in range(101)]
    assert rates[:10] == pytest.approx([PEAK * (step + 1) / 10 for step in range(10)])
    assert rates[10:81] == pytest.approx([PEAK] * 71)
    assert rates[90] == pytest.approx((PEAK + END) / 2) and rates[100] == pytest.approx(END)
    made = schedule("wsd", 100, PEAK, END, 0)
    assert type(made).from_config(made.get_config()).get_config() == made.get_config()
    assert float(schedule("wsd", 5, PEAK, END, 0, 1.0)(0)) == pytest.approx(PEAK)
