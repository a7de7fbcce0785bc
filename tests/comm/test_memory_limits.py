"""Limits on memory: where they are read, and what is refused."""

import resource
from types import SimpleNamespace

import psutil
import pytest

from tf_dist.comm.runtime import memory_limits
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import OutOfMemory

GIB = 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Files of a machine with nothing in them yet, and a process without a limit of its own."""
    monkeypatch.setattr(memory_limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory_limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    monkeypatch.setattr(memory_limits.resource, "getrlimit", lambda name: (resource.RLIM_INFINITY,) * 2)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def node(monkeypatch, swap=0):
    """4 GiB, half of it free."""
    memory = SimpleNamespace(total=4 * GIB, available=2 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=swap))


def process(monkeypatch, size, data):
    used = SimpleNamespace(vms=size, data=data)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: used))


def by_name():
    return {limit.what: (limit.total, limit.free) for limit in memory_limits.limits()}


def test_where_nothing_can_be_read_nothing_is_refused(machine):
    assert memory_limits.limits() == []
    memory_limits.refuse_too_much(SerialComm(), 1 << 60, "nothing")


def test_limits_of_a_process(machine, monkeypatch):
    process(monkeypatch, GIB, GIB // 2)
    monkeypatch.setattr(memory_limits.resource, "getrlimit", lambda name: (3 * GIB, resource.RLIM_INFINITY))
    assert by_name() == {
        "the address space of a process (ulimit -v)": (3 * GIB, 2 * GIB),
        "the data of a process (ulimit -d)": (3 * GIB, 5 * GIB // 2),
    }


def test_memory_of_the_node(machine, monkeypatch):
    node(monkeypatch, swap=GIB)
    assert by_name() == {"the node's memory": (4 * GIB, 3 * GIB)}


def test_cgroups_around_a_process(machine):
    machine("proc/self/cgroup", "0::/job/step\n")
    machine("cgroup/job/step/memory.max", "max\n")
    machine("cgroup/job/memory.max", f"{2 * GIB}\n")
    machine("cgroup/job/memory.stat", f"anon {GIB}\nfile {GIB}\nshmem 0\nfile_dirty 7\n")
    assert by_name() == {"the memory of cgroup /job": (2 * GIB, GIB)}


def test_cgroups_of_version_1_are_left_alone(machine):
    machine("proc/self/cgroup", "5:memory:/job\n")
    assert by_name() == {}


def test_the_limit_of_this_very_process():
    status = {limit.what: limit for limit in memory_limits.limits()}
    assert 0 < status["the node's memory"].free <= status["the node's memory"].total * 2


# What is refused -----------------------------------------------------------------------------------


def asked(wanted, *found):
    return [wanted, [list(limit) for limit in found]]


def test_one_rank_asks_for_too_much():
    own = memory_limits.Limit("its space", "", 4 * GIB, GIB)
    assert memory_limits._refusal([asked(GIB, own), asked(GIB, own)]) == ""
    said = memory_limits._refusal([asked(GIB, own), asked(2 * GIB, own)])
    assert "rank 1 will need at least 2.00 GiB more" in said
    assert "its space, 4.00 GiB, 1.00 GiB are left" in said


def test_ranks_of_a_node_share_its_memory_and_those_of_others_do_not():
    here, there = (memory_limits.Limit("the node's memory", host, 4 * GIB, 3 * GIB) for host in ("a", "b"))
    assert memory_limits._refusal([asked(2 * GIB, here), asked(2 * GIB, there)]) == ""
    assert "2 ranks together will need at least 4.00 GiB" in memory_limits._refusal(
        [asked(2 * GIB, here)] * 2
    )


def test_a_refusal_has_a_code_the_arithmetic_and_a_way_out(machine, monkeypatch):
    node(monkeypatch)
    memory_limits.refuse_too_much(SerialComm(), 2 * GIB, "weights")
    with pytest.raises(OutOfMemory) as caught:
        memory_limits.refuse_too_much(SerialComm(), 2 * GIB + 1, "weights")
    assert caught.value.exit_code == 71
    for words in ("2.00 GiB more", "the node's memory, 4.00 GiB", "(weights)", "--zero-stage 3"):
        assert words in str(caught.value)


def test_room_for_more_is_asked_of_every_limit(machine, monkeypatch):
    assert memory_limits.has_room(1 << 60, 100)
    node(monkeypatch, swap=GIB)
    assert memory_limits.has_room(GIB, 3) and not memory_limits.has_room(GIB, 4)
    process(monkeypatch, GIB, GIB // 2)
    monkeypatch.setattr(memory_limits.resource, "getrlimit", lambda name: (3 * GIB, resource.RLIM_INFINITY))
    assert memory_limits.has_room(GIB, 3) and not memory_limits.has_room(9 * GIB // 4, 1)
