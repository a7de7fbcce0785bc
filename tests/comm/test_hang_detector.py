"""Who is named for what: pure decisions about ranks as others see them."""

import pytest

from tf_dist.comm.health.hang_detector import (
    AT_THE_END,
    Condition,
    Limits,
    PeerStatus,
    condition,
    detect_hang,
    told,
)
from tf_dist.errors import UsageError

CALM = PeerStatus(
    0, "node1", 4700, True, "S", silent_s=0.1, verb="allreduce", waited_s=60.0, step=412, steps=411,
    cpu_share=1.0, where="",
)  # fmt: skip
ABSENT = {"verb": "", "waited_s": 0.0, "where": "my/train.py:17, in load"}
STOPPED = {**ABSENT, "process": "T", "silent_s": 60.0}
WORKING = {**ABSENT, "process": "R", "cpu_share": 0.98}
BLOCKED = {**ABSENT, "cpu_share": 0.001}


def ranks(*changes):
    """One rank for each dictionary of what is different about it."""
    return [CALM._replace(rank=rank, pid=4700 + rank)._replace(**one) for rank, one in enumerate(changes)]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, Condition.FINE),
        (STOPPED, Condition.STOPPED),
        ({"process": "T"}, Condition.STOPPED),  # in the middle of a collective
        ({"process": "t"}, Condition.STOPPED),  # by a debugger
        ({"process": "Z"}, Condition.DEAD),
        ({"process": ""}, Condition.DEAD),
        ({"here": False, "process": "?", "silent_s": 60.0}, Condition.UNREACHABLE),
        ({"here": False, "silent_s": 10.0}, Condition.FINE),  # a message may be late
        ({"here": False, "process": "T", "silent_s": 60.0}, Condition.STOPPED),  # as its node has said
        ({**WORKING, "silent_s": 60.0}, Condition.FROZEN),
        ({"process": "?", "silent_s": 60.0}, Condition.FROZEN),
        (WORKING, Condition.WORKING),
        (BLOCKED, Condition.BLOCKED),
        ({**ABSENT, "process": "?"}, Condition.WORKING),
    ],
)
def test_conditions_are_told_apart(change, kind):
    assert condition(CALM._replace(**change)) is kind


def test_nobody_waits():
    assert detect_hang(ranks(WORKING, BLOCKED)) is None
    assert detect_hang(ranks(STOPPED)) is None


def test_the_missing_one_is_named_by_the_lowest_that_waits():
    stall = detect_hang(ranks(STOPPED, {"waited_s": 61.0}, {"waited_s": 60.0}))
    assert stall.speaker == 1
    assert told(stall) == (
        "rank 0 (pid 4700 on node1) has not come to allreduce of step 412 for 61 s: it is stopped (SIGSTOP). "
        "kill -CONT 4700 lets it go on"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (WORKING, "it is at work (98 % of a core) in my/train.py:17, in load: it is slow"),
        (BLOCKED, "it sleeps or is blocked in my/train.py:17, in load"),
        ({"process": "", **ABSENT}, "it is dead"),
        ({**WORKING, "silent_s": 60.0}, "it is alive (state R), but no Python thread of it has run for 60 s"),
        ({"here": False, "process": "?", "silent_s": 60.0}, "nothing was heard from that host for 60 s"),
    ],
)
def test_what_it_does_is_said_on_one_line(change, words):
    said = told(detect_hang(ranks({}, {}, change)))
    assert said.startswith("rank 2 (pid 4702 on node1) has not come to allreduce of step 412")
    assert words in said and "\n" not in said


def test_who_stops_inside_a_collective_is_the_one_to_name():
    stall = detect_hang(ranks({}, {"process": "T", "silent_s": 60.0}))
    assert [(seen.rank, kind) for seen, kind in stall.culprits] == [(1, Condition.STOPPED)]


def test_several_are_named_and_many_counted():
    said = told(detect_hang(ranks({}, STOPPED, BLOCKED)))
    assert "rank 1" in said and "; rank 2 (pid 4702 on node1) sleeps or is blocked" in said
    said = told(detect_hang(ranks({}, *[STOPPED] * 10)))
    assert "rank 4" in said and "rank 5 " not in said and said.endswith("and 6 more ranks")


def test_all_wait_for_each_other():
    stall = detect_hang(ranks({}, {"verb": "barrier", "waited_s": 59.0}))
    assert stall.culprits == [] and stall.may_abort()
    assert "rank 0 in allreduce; rank 1 in barrier" in told(stall) and "TF_DIST_DEBUG=1" in told(stall)


def test_a_message_between_two_ranks():
    said = told(detect_hang(ranks({"verb": "receive from rank 1"}, STOPPED)))
    assert "has not come to `receive from rank 1` of step 412" in said


def test_before_the_first_step():
    said = told(detect_hang(ranks({"step": 0, "steps": 0}, STOPPED)))
    assert "has not come to allreduce for 60 s" in said


@pytest.mark.parametrize(
    ("change", "ends"),
    [
        (STOPPED, True),
        ({**ABSENT, "process": ""}, True),
        (BLOCKED, True),
        (WORKING, True),  # in the middle of the training
        ({**WORKING, "steps": 0}, False),  # it compiles, or prepares tokens
        ({**WORKING, "steps": 0, "silent_s": 60.0}, False),
        ({**BLOCKED, "steps": 0}, True),
    ],
)
def test_who_may_be_about_to_come_is_given_time(change, ends):
    assert detect_hang(ranks({}, change)).may_abort() is ends


@pytest.mark.parametrize(("change", "ends"), [(WORKING, False), (BLOCKED, False), (STOPPED, True)])
def test_after_the_training_ranks_may_take_their_time(change, ends):
    stall = detect_hang(ranks({"verb": AT_THE_END}, change))
    assert stall.may_abort() is ends
    assert "has not come to the end of the job for 60 s" in told(stall)


def test_who_has_left_is_named_where_nobody_else_is_missing():
    end = {"verb": AT_THE_END, "waited_s": 70.0}
    stall = detect_hang(ranks(end, {}))
    assert stall.speaker == 1 and [kind for _, kind in stall.culprits] == [Condition.LEFT]
    stall = detect_hang(ranks(end, {}, STOPPED))
    assert stall.speaker == 1 and [kind for _, kind in stall.culprits] == [Condition.STOPPED]


def test_limits():
    assert Limits(60.0, 600.0).checked() and Limits(60.0, 0.0).checked() and Limits(0.0, 5.0).checked()
    for wrong in (Limits(60.0, 60.0), Limits(60.0, 10.0), Limits(-1.0, 0.0), Limits(1.0, -5.0)):
        with pytest.raises(UsageError):
            wrong.checked()
