"""Hosts on one machine: that they are hosts, that their links have a speed, that nothing remains."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "emulate_cluster.py"
SPEC = importlib.util.spec_from_file_location("emulate_cluster", SCRIPT)
emulate_cluster = importlib.util.module_from_spec(SPEC)
sys.modules["emulate_cluster"] = emulate_cluster  # dataclasses look their module up
SPEC.loader.exec_module(emulate_cluster)

REMOVED_S = 10
ALLREDUCE_BYTES = 16_000_000
STAR_BYTES = 2_000_000
WHO = """
import json, os, socket, sys
from pathlib import Path
from mpi4py import MPI

comm = MPI.COMM_WORLD
local = comm.Split_type(MPI.COMM_TYPE_SHARED)
mine = Path("/dev/shm/mine")
mine.write_text(socket.gethostname())
comm.Barrier()
seen = [socket.gethostname(), MPI.Get_processor_name(), local.size, mine.read_text(), os.getcwd(),
        sorted(os.sched_getaffinity(0)), socket.gethostbyname("node1")]
everyone = comm.gather(seen)
if comm.rank == 0:
    Path(sys.argv[1]).write_text(json.dumps(everyone))
"""
ALLREDUCE = f"""
import json, sys, time
import numpy as np
from pathlib import Path
from mpi4py import MPI

comm = MPI.COMM_WORLD
ones, total = np.ones({ALLREDUCE_BYTES} // 4, np.float32), np.empty({ALLREDUCE_BYTES} // 4, np.float32)
times = []
for _ in range(4):
    comm.Barrier()
    begun = time.perf_counter()
    comm.Allreduce(ones, total)
    times.append(comm.allreduce(time.perf_counter() - begun, MPI.MAX))
    assert (total == comm.size).all()
if comm.rank == 0:
    Path(sys.argv[1]).write_text(json.dumps(times))
"""
# Rank 0 takes an array from each other rank at once, or sends one to each.
STAR = f"""
import json, sys, time
import numpy as np
from pathlib import Path
from mpi4py import MPI

comm = MPI.COMM_WORLD
array = np.ones({STAR_BYTES}, np.uint8)
times = []
comm.allgather(0)  # so that all are connected
for inwards in (True, False):
    comm.Barrier()
    begun = time.perf_counter()
    if comm.rank:
        comm.Send(array, 0) if inwards else comm.Recv(array, 0)
    else:
        arrays = [np.empty_like(array) for _ in range(1, comm.size)]
        verb = comm.Irecv if inwards else comm.Isend
        MPI.Request.Waitall([verb(given, rank) for rank, given in enumerate(arrays, 1)])
    times.append(comm.allreduce(time.perf_counter() - begun, MPI.MAX))
if comm.rank == 0:
    Path(sys.argv[1]).write_text(json.dumps(times))
"""


@pytest.fixture(scope="module")
def possible(launcher):
    """A skip, with the script's reason, where hosts cannot be emulated."""
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=60)
    if done.returncode in (69, 78):
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr


@pytest.fixture
def start(possible, launcher, tmp_path):
    """``start(flags, *words)``: the job ``emulate_cluster.py flags -- words``."""
    return lambda flags, *words, env=None: launcher.start_command(
        [sys.executable, SCRIPT, *flags, "--", *words], cwd=tmp_path, env=env
    )


def processes_with(marker):
    """The processes whose environment has a marker: all that a job has started, in whatever namespaces."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if marker.encode() in (entry / "environ").read_bytes():
                    found.append(entry)
            except OSError:
                pass  # it has ended meanwhile
    return found


def networks(entries):
    """The network namespaces of processes."""
    names = set()
    for entry in entries:
        try:
            names.add(os.readlink(entry / "ns" / "net"))
        except OSError:
            pass
    return names


def all_networks():
    return networks(entry for entry in Path("/proc").iterdir() if entry.name.isdigit())


def machine_network():
    """Named namespaces and devices of this machine's own network."""
    listed = [
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True).stdout
        for words in (["netns", "list"], ["-oneline", "link"])
    ]
    return re.findall(r"\b(?:node|port)\d+\b|\bswitch\b", "".join(listed))


def wait_for(condition, seconds=REMOVED_S):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_hosts_are_hosts(start, tmp_path):
    """Their names, their share of memory and of the cores are their own; folders are shared."""
    (tmp_path / "who.py").write_text(WHO)
    job = start(
        ["--hosts", "2", "--slots", "2", "--np", "3"], sys.executable, "who.py", tmp_path / "who.json"
    )
    ended = job.wait()
    assert ended.code == 0, ended.output
    first, second, third = json.loads((tmp_path / "who.json").read_text())
    assert first == second
    cores = sorted(os.sched_getaffinity(0))
    half = [cores[: len(cores) // 2], cores[len(cores) // 2 :]] if len(cores) > 1 else [cores, cores]
    assert first == ["node0", "node0", 2, "node0", str(tmp_path), half[0], "10.0.0.2"]
    assert third == ["node1", "node1", 1, "node1", str(tmp_path), half[1], "10.0.0.2"]
    assert "node0" in ended.output and "1gbit" in ended.output


def test_links_have_the_rate(start, tmp_path):
    """The lower bound is the limiter's; the machine's speed can only add to it."""
    (tmp_path / "allreduce.py").write_text(ALLREDUCE)
    fastest = {}
    for rate in ("1gbit", "10gbit"):
        ended = start(["--rate", rate], sys.executable, "allreduce.py", tmp_path / rate).wait()
        assert ended.code == 0, ended.output
        fastest[rate] = min(json.loads((tmp_path / rate).read_text()))
    # Two hosts: each sends and receives the array once, 2 (N - 1) / N times its size.
    assert fastest["1gbit"] > 0.9 * ALLREDUCE_BYTES * 8 / 1e9
    assert fastest["10gbit"] < fastest["1gbit"]


def test_a_host_has_one_link_in_each_direction(start, tmp_path):
    """Two hosts that send to a third share its link, and so do two that it sends to."""
    (tmp_path / "star.py").write_text(STAR)
    ended = start(
        ["--hosts", "3", "--rate", "100mbit"], sys.executable, "star.py", tmp_path / "star.json"
    ).wait()
    assert ended.code == 0, ended.output
    inwards, outwards = json.loads((tmp_path / "star.json").read_text())
    assert inwards > 0.9 * 2 * STAR_BYTES * 8 / 1e8
    assert outwards > 0.9 * 2 * STAR_BYTES * 8 / 1e8


@pytest.mark.parametrize("slots", [2])
def test_training_over_hosts_is_training_on_one(start, launcher, small, tmp_path, slots):
    """In bits, though its gradients leave during the backward pass; with two slots, by a window first."""
    flags = [*small, "--steps", "10", "--threads-per-rank", "1", "--run-dir"]
    one = launcher.start(2, "train.py", *flags, tmp_path / "one", cwd=tmp_path).wait()
    assert one.code == 0, one.output
    train = SCRIPT.with_name("train.py")
    hosts = ["--hosts", "2", "--slots", str(slots)]
    two = start(hosts, sys.executable, train, *flags, tmp_path / "two").wait()
    assert two.code == 0, two.output
    status = [json.loads((tmp_path / run / "status.json").read_text()) for run in ("one", "two")]
    assert [found["ranks"] for found in status] == [2, 2 * slots]
    assert "gradients leave during the backward pass" in two.output
    assert re.search(r"exchange +[\d.]+ ms a step under way, [\d.]+ ms of it waited for", two.output)
    assert "during the backward pass" not in one.output
    assert status[0]["weights_sha256"] == status[1]["weights_sha256"]


def test_exit_code_comes_back(start):
    ended = start([], "sh", "-c", "exit 13").wait()
    assert ended.code == 13, ended.output


def start_sleeping(start, tmp_path, marker):
    """A job whose ranks have all begun to sleep, the processes it has, and their networks."""
    ranks = "touch begun-$OMPI_COMM_WORLD_RANK; exec sleep 4000"
    job = start(["--hosts", "3"], "sh", "-c", ranks, env={"TF_DIST_TEST_MARK": marker})
    job.wait_until(lambda: len(list(tmp_path.glob("begun-*"))) == 3, timeout=60)
    found = processes_with(marker)
    # The machine's, the switch's and three hosts'.
    assert len(networks(found)) == 5
    return job, networks(found) - {os.readlink("/proc/self/ns/net")}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_nothing_remains(start, tmp_path, number):
    marker = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    job, made = start_sleeping(start, tmp_path, marker)
    assert made <= all_networks()
    assert not machine_network()
    os.kill(job.pid, number)
    assert wait_for(lambda: not job.running())
    ended = job.wait()
    assert ended.code == -number if number == signal.SIGKILL else ended.code > 0
    assert wait_for(lambda: not processes_with(marker)), processes_with(marker)
    assert wait_for(lambda: not made & all_networks())
    assert not machine_network()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_while_hosts_are_built(start, number):
    """Whenever it comes: it is taken, and nothing remains."""
    for delay in (0.3, 0.6):
        marker = f"mark-{os.getpid()}-{time.monotonic_ns()}"
        job = start(["--hosts", "16"], "sleep", "4000", env={"TF_DIST_TEST_MARK": marker})
        time.sleep(delay)
        os.kill(job.pid, number)
        assert wait_for(lambda job=job: not job.running()), job.output()
        assert wait_for(lambda marker=marker: not processes_with(marker))


def test_an_mpirun_that_does_not_end_is_not_waited_for(monkeypatch):
    codes = []
    monkeypatch.setattr(emulate_cluster, "GRACE_S", 0.05)
    monkeypatch.setattr(os, "_exit", codes.append)
    with subprocess.Popen(["sh", "-c", "trap '' TERM USR1; echo; read line"], stdin=-1, stdout=-1) as deaf:
        assert deaf.stdout.readline()
        emulate_cluster.signal_job(deaf, signal.SIGUSR1)
        assert not wait_for(lambda: codes, 0.3)  # a signal to save is no reason to end
        emulate_cluster.signal_job(deaf, signal.SIGTERM)
        assert wait_for(lambda: codes) == [143]
        deaf.stdin.close()


def test_a_signal_to_save_reaches_the_ranks(start, tmp_path):
    ranks = "trap 'exit 0' USR1; touch begun-$OMPI_COMM_WORLD_RANK; while :; do sleep 0.1; done"
    job = start([], "sh", "-c", ranks)
    job.wait_until(lambda: len(list(tmp_path.glob("begun-*"))) == 2, timeout=60)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait(60).code == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--rate", "nonsense", "--", "true"], "--rate nonsense"),
        (["--rate", "0gbit", "--", "true"], "--rate 0gbit"),
        (["--rate", "1gbit; true", "--", "true"], "--rate 1gbit; true"),
        (["--hosts", "0", "--", "true"], "--hosts 0"),
        (["--hosts", "65", "--", "true"], "--hosts 65"),
        (["--hosts", "many", "--", "true"], "--hosts"),
        (["--slots", "0", "--", "true"], "--slots 0"),
        (["--np", "3", "--", "true"], "2 hosts of 1 slots hold 1 to 2 ranks"),
        (["--np", "-1", "--", "true"], "--np -1"),
        (["--nosuch", "--", "true"], "--nosuch"),
        (["--check", "--", "true"], "--check"),
        (["true"], "true"),
        ([], "-- COMMAND"),
    ],
)
def test_bad_flags(flags, said, capsys):
    assert emulate_cluster.main(flags) == 64
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere that comes first")
@pytest.mark.parametrize(
    ("missing", "code", "said"),
    [("root", 78, "needs root"), ("tc", 69, "install iproute2"), ("nsenter", 69, "install util-linux")],
)
def test_what_is_missing_is_named(missing, code, said, monkeypatch, capsys):
    which = shutil.which
    monkeypatch.setattr(os, "geteuid", lambda: 1000 if missing == "root" else 0)
    monkeypatch.setattr(
        shutil, "which", lambda name: None if name == missing else which(name) or f"/bin/{name}"
    )
    assert emulate_cluster.main(["--check"]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: no hosts can be emulated, because ") and error.count("\n") == 1
    assert said in error


@pytest.mark.parametrize("capability", ["net_admin", "sys_admin"])
def test_a_container_without_the_right_says_so(possible, capability):
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv to give up a capability with")
    command = ["setpriv", "--bounding-set", f"-{capability}", sys.executable, SCRIPT, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 78
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "not permitted" in done.stderr and "--privileged" in done.stderr


def test_another_mpi_is_refused(monkeypatch, tmp_path):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text("#!/bin/sh\necho 'HYDRA build details: Version: 4.2'\n")
    mpirun.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(emulate_cluster.BackendMissing, match="not Open MPI 5"):
        emulate_cluster.find_mpirun()


@pytest.mark.parametrize(("hosts", "cores"), [(1, 4), (2, 4), (3, 4), (4, 4), (5, 4), (7, 2), (2, 1)])
def test_cores_are_dealt_out(hosts, cores, monkeypatch):
    """Each host has one at least, all are used, and none twice while there are enough."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 10 + cores)))
    dealt = [emulate_cluster.cores_of(host, hosts) for host in range(hosts)]
    assert all(dealt)
    assert {core for share in dealt for core in share} == set(range(10, 10 + cores))
    assert sum(map(len, dealt)) == max(hosts, cores)
