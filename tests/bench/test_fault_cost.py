"""The arithmetic of what readiness costs, of canned jobs."""

import pytest

from tf_dist.bench.faults import cost

JOB = {
    "step": 100.0,
    "compare": 2.0,
    "save": 200.0,
    "exposed": 20.0,
    "copies": 7.0,
    "beat": 0.1,
    "beat_every_s": 0.25,
    "check_every": 100,
}


def jobs(*steps, **more):
    return [{**JOB, "step": step, **more} for step in steps]


def tiny(plain, ulfm):
    return {"plain": [{"step": plain}], "ulfm": [{"step": ulfm}]}


def test_shares_of_a_step():
    found = {"plain": jobs(100.0, 102.0, 98.0), "ulfm": jobs(103.0, 103.0, 190.0)}
    row = cost.shares(found, tiny(3.0, 4.0))
    assert row["ulfm"] == pytest.approx(1.0) and row["ulfm itself"] == pytest.approx(3.0)
    assert row["watchdog"] == pytest.approx(0.04)
    assert row["check"] == pytest.approx(0.02)
    assert row["interval_s"] == pytest.approx((2 * 0.2 * 3600) ** 0.5)
    assert row["checkpoint"] == pytest.approx(100 * 0.2 / row["interval_s"])
    assert row["together"] == pytest.approx(1.06 + row["checkpoint"])
    cells = cost.table(["a model"], [row]).splitlines()[-1].split()
    assert cells[2:6] == ["100.0", "1.00", "(+3.0)", "0.04"] and cells[-2:] == ["1.6", "7"]


def test_what_costs_nothing_is_not_counted_against_the_rest():
    row = cost.shares({"plain": jobs(100.0, save=-3.0), "ulfm": jobs(90.0, save=-3.0)}, tiny(3.0, 2.9))
    assert row["ulfm"] == 0 and row["checkpoint"] == 0 and row["together"] == pytest.approx(0.06)
