"""Ranks of a node as /proc shows them: who has come, who is gone, and which cores other jobs are bound to."""

import os
import time

import psutil
import pytest

from tf_dist import processes
from tf_dist.comm.runtime import core_binding, startup
from tf_dist.comm.runtime.startup import LocalRanks, ensure_home, wait_for_local_ranks
from tf_dist.errors import TfDistError

STAT = "{pid} (python (x)) {state} 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 0 0 1 0 7 0 0" + " 0" * 30


class Proc:
    """A /proc that is made up."""

    def __init__(self, path):
        self.path = path
        (path / "self").mkdir()
        (path / "self" / "environ").touch()
        (path / "stat").write_text("btime 1000000000\n")

    def process(self, pid, rank=None, job="ours", mpi=False, state="S"):
        folder = self.path / str(pid)
        folder.mkdir(exist_ok=True)
        words = (
            [f"PMIX_NAMESPACE={job}", f"OMPI_COMM_WORLD_RANK={rank}"] if rank is not None else ["PATH=/bin"]
        )
        (folder / "environ").write_text("\0".join(words) + "\0")
        (folder / "maps").write_text("7f00 r-xp /opt/lib/libmpi.so.40\n" if mpi else "7f00 r-xp libc.so.6\n")
        (folder / "stat").write_text(STAT.format(pid=pid, state=state))

    def ends(self, pid):
        for path in (self.path / str(pid)).iterdir():
            path.unlink()
        (self.path / str(pid)).rmdir()


@pytest.fixture
def proc(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    return Proc(tmp_path)


def environment(rank, count=2, **more):
    return {
        "PMIX_NAMESPACE": "ours", "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(count),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(count), **more,
    }  # fmt: skip


def test_a_rank_has_come_when_it_has_loaded_mpi(proc):
    """Also where a script of the user's is between the launcher and it; other jobs do not count."""
    proc.process(10, rank=0, mpi=True)
    proc.process(11, rank=1)
    proc.process(20, rank=1, job="theirs", mpi=True)
    ranks = LocalRanks("ours")
    assert not ranks.all_here(2)
    proc.process(12, rank=1, mpi=True)
    assert ranks.all_here(2)
    assert sorted(ranks.alive()) == [0, 1] and ranks.gone() == []


@pytest.mark.parametrize("end", ["gone", "zombie"])
def test_a_rank_that_ends_before_is_named(proc, end):
    proc.process(10, rank=0, mpi=True)
    proc.process(11, rank=1)
    ranks = LocalRanks("ours")
    assert not ranks.all_here(2)
    if end == "gone":
        proc.ends(11)
    else:
        proc.process(11, rank=1, state="Z")
    assert not ranks.all_here(2) and ranks.gone() == [1]


def test_a_process_that_was_just_forked_becomes_a_rank(proc):
    """Its environment is still that of the launcher when it is seen first."""
    proc.process(10, rank=0, mpi=True)
    proc.process(11)
    ranks = LocalRanks("ours")
    assert not ranks.all_here(2)
    proc.process(11, rank=1, mpi=True)
    assert ranks.all_here(2)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_one_voice_says_who_never_came(proc, clock, monkeypatch):
    proc.process(10, rank=0, mpi=True)
    proc.process(12, rank=2, mpi=True)
    with pytest.raises(TfDistError, match="rank 1 ended before") as caught:
        wait_for_local_ranks(environment(0, 3), 1)
    assert caught.value.exit_code == 70 and clock[0] > startup.STARTED_S

    def end(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="70"):
        wait_for_local_ranks(environment(2, 3), 1)


def test_a_rank_that_may_not_be_looked_at_is_not_missed(proc, clock):
    """Another user's: its environment cannot be read, but the launcher has as many children as ranks."""
    proc.process(10, rank=0, mpi=True)
    proc.process(11)
    wait_for_local_ranks(environment(0), 1)
    assert clock[0] > startup.STARTED_S


@pytest.mark.parametrize("variables", [{}, environment(0, 1), environment(0) | {"PMIX_NAMESPACE": ""}])
def test_where_nothing_is_known_nobody_waits(proc, variables):
    wait_for_local_ranks(variables, 1)


def test_a_home_is_found(monkeypatch, tmp_path):
    theirs = {"HOME": "/somewhere"}
    ensure_home(theirs)
    assert theirs == {"HOME": "/somewhere"}
    ours = {}
    ensure_home(ours)
    assert os.path.isdir(ours["HOME"])
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    nobodys = {}
    ensure_home(nobodys)
    assert os.access(nobodys["HOME"], os.W_OK)


def test_cores_that_another_job_is_bound_to(proc, monkeypatch):
    bound = {10: [0], 20: [0, 1, 3], 21: [4], 22: list(range(8)), 30: [0]}
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda process: bound[process.pid])
    proc.process(10, rank=0)
    proc.process(20, rank=0, job="theirs")
    proc.process(21, rank=1, job="theirs")
    proc.process(22, rank=0, job="free")
    proc.process(30)
    assert core_binding.shared_with("ours", [0, 1]) == {20: [0, 1]}


def test_a_rank_that_is_bound_to_no_core_shares_none(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert core_binding.warning("ours", [0, 1]) == "" and core_binding.warning("", [0]) == ""
