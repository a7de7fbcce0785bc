"""Control messages: a collective that meets another one is named on every rank."""

import pytest
from thread_comm import on_ranks

from tf_dist.comm import control_messages
from tf_dist.comm.runtime.consensus import agree, on_root
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError


def all_raised(outcomes, *words):
    assert all(isinstance(one, LaunchError) for one in outcomes), outcomes
    assert len({str(one) for one in outcomes}) == 1
    for word in words:
        assert word in str(outcomes[0])


def test_values_of_one_purpose_arrive():
    assert (
        on_ranks(3, lambda comm: comm.allgather_obj(comm.rank, what="the number of each rank"))
        == [[0, 1, 2]] * 3
    )
    assert on_ranks(2, lambda comm: comm.broadcast_obj({"a": comm.rank}, 1)) == [{"a": 1}] * 2
    assert SerialComm().broadcast_obj([1, None, "x"]) == [1, None, "x"]


def test_two_purposes_are_named_on_every_rank():
    def begin(comm):
        if comm.rank == 0:
            return comm.broadcast_obj(3, what="broadcast_state of BroadcastWeights")
        return comm.allgather_obj([1, 2], what="build of the optimizer")

    all_raised(
        on_ranks(3, begin),
        "rank 0 in broadcast_state of BroadcastWeights",
        "ranks 1, 2 in build of the optimizer",
        "test_control_messages.py:",
    )


def test_the_verb_and_the_root_are_compared():
    all_raised(on_ranks(2, lambda comm: comm.broadcast_obj(1, comm.rank)), "rank 0", "rank 1")
    all_raised(
        on_ranks(2, lambda comm: comm.allgather_obj(1) if comm.rank else comm.broadcast_obj(1)),
        "allgather_obj",
        "broadcast_obj of rank 0",
    )


def test_functions_of_the_package_name_themselves():
    def begin(comm):
        return on_root(comm, lambda: 1) if comm.rank else agree(comm, {"a": 1}, "the run")

    all_raised(on_ranks(2, begin), "the comparison of the run", "broadcast_obj of rank 0")


def test_users_may_call_from_different_functions():
    def lead(comm):
        return comm.broadcast_obj("work")

    def follow(comm):
        return comm.broadcast_obj(None)

    assert on_ranks(2, lambda comm: lead(comm) if comm.rank == 0 else follow(comm)) == ["work"] * 2


@pytest.mark.parametrize("raw", [b"", b"\xff\x00", b"[1,2]", b'{"a":1}', b"3"])
def test_bytes_of_another_collective_are_no_control_message(raw):
    class Garbled(SerialComm):
        def _allgather_bytes(self, mine):
            return [raw]

    with pytest.raises(LaunchError, match="different collectives: this one is in the plan"):
        Garbled().allgather_obj(1, what="the plan")


def test_what_is_too_large_or_no_json_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr(control_messages, "BYTES_LIMIT", 100)
    with pytest.raises(ValueError, match="too many for an object"):
        SerialComm().allgather_obj("x" * 200)
    with pytest.raises(TypeError):
        SerialComm().allgather_obj({1, 2})
