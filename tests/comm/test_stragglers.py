"""Who is slow, from the numbers alone."""

from tf_dist.comm.health.stragglers import WINDOW_STEPS, Stragglers
from tf_dist.comm.timers import CommTimers, WorkRate


def named(ways, steps=20, every=WINDOW_STEPS):
    """The steps at which somebody is named, and who.

    Args:
        ways: for each rank the seconds and the units of a step, or a function of the step that gives them.
    """
    watch, paces, found = Stragglers(), {rank: WorkRate() for rank in range(len(ways))}, []
    watch.look(paces)
    for step in range(1, steps + 1):
        for rank, way in enumerate(ways):
            own_s, units = way(step) if callable(way) else way
            before = paces[rank]
            paces[rank] = WorkRate(step, before.own_s + own_s, before.units + units)
        if step % every == 0:
            found += [(step, one) for one in watch.look(paces)]
    return found


def test_a_slow_rank_is_named_within_twenty_steps_with_what_it_costs():
    step, one = named([(0.1, 4), (0.25, 4), (0.11, 4)])[0]
    assert step <= 20 and one.rank == 1
    assert abs(one.ratio - 0.25 / 0.105) < 0.01 and abs(one.ms - 145) < 0.1


def test_two_ranks_are_enough():
    assert {one.rank for _, one in named([(0.1, 1), (0.2, 1)])} == {1}


def test_who_has_more_to_do_is_not_slow():
    assert not named([(0.2, 2), (0.1, 1), (0.1, 1)])


def test_who_is_slow_now_and_then_is_not_named():
    assert not named([(0.1, 1), lambda step: (0.5 if 5 < step <= 10 else 0.1, 1)])


def test_a_little_slower_is_noise():
    assert not named([(0.1, 1), (0.14, 1), (0.1, 1)])


def test_short_steps_are_gathered_until_they_say_something():
    assert not named([(0.001, 1), (0.003, 1)], steps=60)
    assert named([(0.001, 1), (0.003, 1)], steps=200)


def test_ranks_without_comparable_work_are_left_out():
    assert not named([(0.1, 0), (0.9, 0)])
    assert not named([(0.1, 1), (0.9, 0)])


def test_a_rank_that_dies_begins_it_all_anew():
    watch = Stragglers()
    for step in (0, 10, 20):
        watch.look({0: WorkRate(step, step, step), 1: WorkRate(step, 3 * step, step)})
    assert watch.look({0: WorkRate(21, 21, 21)}) == []


def test_a_record_keeps_what_is_spent_outside_collectives(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    record = CommTimers()
    record.begin_step(1)
    now[0] += 3.0
    record.comm_s += 0.5
    record.wait_s += 1.5
    record.end_step(4)
    assert record.pace == WorkRate(1, 1.0, 4) and record.step == 1
    now[0] += 2.0  # a callback
    record.begin_step(2)
    now[0] += 1.0
    record.end_step(4)
    assert record.pace == WorkRate(2, 4.0, 8)
    record.next_step()
    now[0] += 1.0
    record.next_step()
    assert (record.step, record.pace.steps, record.pace.units) == (4, 4, 10)
