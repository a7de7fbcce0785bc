"""Processes that ranks start: they end, whatever they are, and none takes itself for the rank."""

import pytest

pytestmark = pytest.mark.cold

CHILDREN = """
import multiprocessing, os, subprocess, sys
import numpy as np
from tf_dist.comm.runtime import launch

def work():
    pass

def join():
    from tf_dist.comm.runtime import launch
    launch.join()

def fail():
    raise ValueError("the words of a child")

def said(name, value):
    print(f"{comm.rank} {name} {value}", flush=True)

if __name__ == "__main__":
    comm = launch.join()
    for how, function in (("fork", work), ("fork", fail), ("fork", join), ("spawn", work), ("spawn", join)):
        child = multiprocessing.get_context(how).Process(target=function)
        child.start()
        child.join(60)
        said(f"{how} {function.__name__}", child.exitcode)
    for leave in (lambda: sys.exit(3), lambda: fail(), lambda: sys.exit()):
        pid = os.fork()
        if not pid:
            leave()
            sys.exit(0)
        said("os.fork", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    joins = [sys.executable, "-c", "from tf_dist.comm.runtime import launch; print(launch.join().size)"]
    said("subprocess", subprocess.run(joins, stdout=subprocess.PIPE, timeout=60).stdout.split())
    nested = [sys.argv[1], "-np", "2", *joins]
    said("nested", subprocess.run(nested, stdout=subprocess.PIPE, timeout=60).stdout.split())
    ones = np.ones(3)
    comm.allreduce(ones)
    said("sum", ones.tolist())
"""


def test_children_of_ranks_end(run_job, launcher, tmp_path):
    (tmp_path / "job.py").write_text(CHILDREN)
    job = run_job(2, "job.py", launcher._mpirun, timeout=120)
    assert job.code == 0, job.output
    for rank in (0, 1):
        lines = [line[2:] for line in job.output.splitlines() if line.startswith(f"{rank} ")]
        assert lines == [
            "fork work 0", "fork fail 1", "fork join 1", "spawn work 0", "spawn join 1",
            "os.fork 3", "os.fork 1", "os.fork 0",
            "subprocess [b'1']", "nested [b'2', b'2']", "sum [2.0, 2.0, 2.0]",
        ]  # fmt: skip
    assert job.output.count("if __name__") >= 4
