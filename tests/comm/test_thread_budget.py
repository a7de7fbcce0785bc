import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from tf_dist.comm.runtime import thread_budget
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError

# Shares of a node ---------------------------------------------------------------------------------


def rank_on(host, cores, quota=1e9):
    return {"host": host, "cores": list(cores), "quota": quota}


def threads_of(everyone):
    return [thread_budget._place(everyone, rank).threads for rank in range(len(everyone))]


def test_bound_ranks_have_their_own_cores():
    assert threads_of([rank_on("a", [core]) for core in range(4)]) == [1, 1, 1, 1]
    assert threads_of([rank_on("a", range(4)), rank_on("a", range(4, 8))]) == [4, 4]


def test_free_ranks_share_the_node():
    assert threads_of([rank_on("a", range(8))]) == [8]
    assert threads_of([rank_on("a", range(8))] * 2) == [4, 4]
    assert threads_of([rank_on("a", range(8))] * 3) == [2, 2, 2]
    # 3 x 1/3 is 0.99... in floating point, and still a whole core.
    assert threads_of([rank_on("a", range(3))] * 3) == [1, 1, 1]
    assert threads_of([rank_on("a", range(9))] * 3) == [3, 3, 3]


def test_more_ranks_than_cores_get_one_thread_each():
    assert threads_of([rank_on("a", range(2))] * 5) == [1] * 5


def test_masks_that_overlap():
    assert threads_of([rank_on("a", range(4)), rank_on("a", range(2, 4))]) == [3, 1]


def test_two_hosts_do_not_share_cores():
    everyone = [rank_on("a", range(4)), rank_on("b", range(4)), rank_on("a", range(4))]
    assert threads_of(everyone) == [2, 4, 2]
    made = [thread_budget._place(everyone, rank) for rank in range(3)]
    assert [(place.host, place.local_rank, place.local_size) for place in made] == [
        ("a", 0, 2), ("b", 0, 1), ("a", 1, 2),
    ]  # fmt: skip
    assert made[1].cores == (0, 1, 2, 3)


def test_a_quota_is_shared_by_the_ranks_of_its_host():
    assert threads_of([rank_on("a", range(64), quota=2.0)]) == [2]
    assert threads_of([rank_on("a", range(64), quota=4.0)] * 2) == [2, 2]
    assert threads_of([rank_on("a", range(64), quota=1.5)] * 2) == [1, 1]
    assert threads_of([rank_on("a", range(2), quota=16.0)]) == [2]


def test_this_process_has_a_place():
    [place] = thread_budget.places(SerialComm())
    assert place.cores == tuple(sorted(os.sched_getaffinity(0)))
    assert 1 <= place.threads <= len(place.cores)
    assert thread_budget.cpu_quota() >= 1


# What TensorFlow is told ---------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch):
    """An environment of our own, in which TensorFlow was not imported yet."""
    monkeypatch.setattr(os, "environ", {})
    for name in ("tensorflow", "keras"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with threadpool_limits(user_api="blas"):  # of this process, given back afterwards
        yield os.environ


def test_threads_are_set_before_tensorflow_reads_them(environment):
    place = thread_budget.set_threads(SerialComm(), 3)
    assert place.threads == 3
    assert {environment[name] for name in thread_budget.THREAD_VARIABLES} == {"3"}
    assert environment["TF_NUM_INTEROP_THREADS"] == "2"
    assert environment["KERAS_BACKEND"] == "tensorflow"
    found = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert set(found) == {3}


def test_the_share_is_the_default(environment):
    place = thread_budget.set_threads(SerialComm())
    assert environment["OMP_NUM_THREADS"] == str(place.threads)


class Threading:
    """What ``tf.config.threading`` does, before TensorFlow has computed anything and after."""

    def __init__(self, computed):
        self.computed, self.told = computed, []

    def set_intra_op_parallelism_threads(self, number):
        if self.computed:
            raise RuntimeError("Intra op parallelism cannot be modified after initialization.")
        self.told.append(number)

    set_inter_op_parallelism_threads = set_intra_op_parallelism_threads


@pytest.mark.parametrize("computed", [False, True])
def test_tensorflow_came_first(environment, monkeypatch, capsys, computed):
    """Imported is early enough; once it has computed, its threads stay what they are, which is said."""
    threading = Threading(computed)
    tensorflow = SimpleNamespace(config=SimpleNamespace(threading=threading))
    monkeypatch.setitem(sys.modules, "tensorflow", tensorflow)
    monkeypatch.setattr(thread_budget, "_told", [])
    thread_budget.set_threads(SerialComm(), 3)
    assert threading.told == ([] if computed else [3, 2])
    assert ("TF_NUM_INTRAOP_THREADS" in environment) is not computed
    assert ("before tf_dist.connect()" in capsys.readouterr().err) is computed
    threading.computed = True
    monkeypatch.setattr(thread_budget, "_told", [3])  # by us, as the same number is wanted again
    thread_budget.set_threads(SerialComm(), 3)
    assert "before tf_dist.connect()" not in capsys.readouterr().err


def test_another_keras(environment):
    environment["KERAS_BACKEND"] = "jax"
    with pytest.raises(LaunchError, match="backend is 'jax'"):
        thread_budget.set_threads(SerialComm(), 1)


# How TensorFlow is loaded --------------------------------------------------------------------------


def loading(program, **environment):
    program = f"from tf_dist.comm.runtime import thread_budget\n{program}"
    environment = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
    )


def fake_tensorflow(folder, body):
    (folder / "tensorflow.py").write_text("import os\n" + body)
    return os.pathsep.join([str(folder), *sys.path])


def test_tensorflow_is_loaded_without_its_greeting():
    ended = loading("thread_budget.load_tensorflow(); import sys; print('tensorflow' in sys.modules)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


CHATS = "os.write(2, b'I0000 00:00 port.cc:153] oneDNN\\nE0000 00:00 no.cc:1] help\\n')\n"


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ("2", "E0000 00:00 no.cc:1] help\n"),
        ("0", "I0000 00:00 port.cc:153] oneDNN\nE0000 00:00 no.cc:1] help\n"),
    ],
)
def test_everything_else_is_passed_on(tmp_path, level, said):
    path = fake_tensorflow(tmp_path, CHATS)
    ended = loading("thread_budget.load_tensorflow()", PYTHONPATH=path, TF_CPP_MIN_LOG_LEVEL=level)
    assert (ended.returncode, ended.stderr) == (0, said)


def test_a_tensorflow_that_does_not_load_says_why(tmp_path):
    path = fake_tensorflow(tmp_path, CHATS + "raise ImportError('undefined symbol')")
    ended = loading("thread_budget.load_tensorflow()", PYTHONPATH=path)
    assert ended.returncode == 1
    assert "] help" in ended.stderr and "ImportError: undefined symbol" in ended.stderr
