"""The claims of our documentation about other ways to train, as `scripts/check_peers.py` checks them.

A peer that gets repaired is good news, not a failing test: it is printed, for us to correct
the documentation.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_peers.py"
SPEC = importlib.util.spec_from_file_location("check_peers", SCRIPT)
check_peers = importlib.util.module_from_spec(SPEC)
sys.modules["check_peers"] = check_peers  # dataclasses look their module up
SPEC.loader.exec_module(check_peers)

QUICK = ["hvd-optimizer", "hvd-tensors", "mwms", "data-parallel", "model-parallel", "naive", "hang"]
SLOW = [name for name in check_peers.CLAIMS if name not in QUICK]
LIMIT_S = 300


def seen(records, *, finished=True, log=""):
    return check_peers.Seen(records=records, finished=finished, seconds=5.0, log=log)


def trained(after, error=""):
    return {"before": "00", "after": after, "error": error}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        pytest.skip("started under mpirun; this test launches its own ranks")
    for module in ("tensorflow", "keras", "mpi4py"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if check_peers.find_mpirun() is None:
        pytest.skip("no mpirun beside this Python or on PATH")
    path = tmp_path_factory.mktemp("peers") / "peers.json"
    command = [sys.executable, SCRIPT, "--json", path, "--hang-seconds", "6", "--only", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()) | {"stdout": done.stdout}


@pytest.mark.extended
def test_every_claim_asked_for_has_a_result(report):
    assert [row["name"] for row in report["results"]] == QUICK
    for row in report["results"]:
        assert row["claim"] == check_peers.CLAIMS[row["name"]].text
        assert row["result"] in (check_peers.HOLDS, check_peers.GONE, check_peers.NOT_CHECKED)


@pytest.mark.extended
def test_every_result_has_its_evidence(report, capsys):
    for row in report["results"]:
        assert row["seen"].strip(), row
        if row["result"] != check_peers.HOLDS:
            with capsys.disabled():
                print(f"\nLOOK: {row['name']}: {row['result']}: {row['seen']}")


@pytest.mark.extended
def test_only_a_missing_horovod_may_leave_a_claim_unchecked(report):
    unchecked = [row["name"] for row in report["results"] if row["result"] == check_peers.NOT_CHECKED]
    if report["versions"]["horovod"] == "missing":
        unchecked = [name for name in unchecked if not name.startswith("hvd-")]
    assert not unchecked, [row for row in report["results"] if row["name"] in unchecked]


@pytest.mark.extended
def test_versions_are_named(report):
    assert set(report["versions"]) >= {"python", "tensorflow", "keras", "mpi4py", "mpirun", "horovod"}
    assert f"tensorflow {report['versions']['tensorflow']}" in report["stdout"]


def test_no_claim_is_forgotten():
    assert set(QUICK) <= set(check_peers.CLAIMS)
    assert SLOW == ["hvd-broadcast", "hvd-metrics", "hvd-warmup"]  # one job, read below by the same judge
    assert {claim.job for claim in check_peers.CLAIMS.values()} == set(check_peers.JOBS)


@pytest.mark.parametrize(
    ("name", "records", "result"),
    [
        ("hvd-optimizer", {"hvd-optimizer": [trained("a"), trained("b")]}, "holds"),
        ("hvd-optimizer", {"hvd-optimizer": [trained("a"), trained("a")]}, "does not hold any more"),
        ("hvd-optimizer", {"hvd-optimizer": [trained("a", "TypeError: x")] * 2}, "holds"),
        ("hvd-tensors", {"hvd-tensors": [{"allreduce": ""}] * 2}, "holds"),
        (
            "hvd-tensors",
            {"hvd-tensors": [{"allreduce": ""}, {"allreduce": "wrong"}]},
            "does not hold any more",
        ),
        ("hvd-tensors", {"hvd-tensors": [{"allreduce": ""}]}, "not checked"),  # one rank is silent
        ("hvd-warmup", {"hvd-warmup": [trained("a", "AttributeError: x")] * 2}, "holds"),
        ("hvd-metrics", {"hvd-metrics": [trained("a")] * 2}, "does not hold any more"),
        ("mwms", {"mwms": [{"error": "ValueError: x", "after": "a"}] * 2}, "holds"),
        ("mwms", {"mwms": [{"error": "UnavailableError: port", "after": "a"}] * 2}, "not checked"),
        ("mwms", {"mwms": [{"error": "", "after": "a"}] * 2}, "does not hold any more"),
        ("data-parallel", {"data-parallel": [{"devices": ["a", "b"], "rows": [8]}]}, "holds"),
        (
            "data-parallel",
            {"data-parallel": [{"devices": ["a", "b"], "rows": [4, 4]}]},
            "does not hold any more",
        ),
        ("naive", {"naive": [trained("a"), trained("b")]}, "holds"),
        ("naive", {"naive": [trained("a"), trained("a")]}, "does not hold any more"),
    ],
)
def test_judgement(name, records, result):
    if name == "hvd-optimizer":
        records = records | {"unwrapped": [trained("c"), trained("d")]}
    text, judged = check_peers.answer(check_peers.CLAIMS[name], seen(records))
    assert (judged, bool(text)) == (result, True)


@pytest.mark.parametrize(
    ("log", "finished", "result"),
    [
        ("RuntimeError: a bug on the last rank", False, "holds"),
        ("RuntimeError: a bug on the last rank", True, "does not hold any more"),
        ("", False, "not checked"),  # a slow machine: nothing has been raised yet
    ],
)
def test_judgement_of_a_hang(log, finished, result):
    records = {"hang": [{"raises": False}, {"raises": True}]}
    assert (
        check_peers.answer(check_peers.CLAIMS["hang"], seen(records, finished=finished, log=log))[1] == result
    )


@pytest.mark.parametrize(("strict", "code"), [([], 0), (["--strict"], 1)])
def test_strict_turns_a_repaired_peer_into_an_exit_code(monkeypatch, capsys, strict, code):
    row = check_peers.Result("naive", "a claim", "an evidence", check_peers.GONE)
    monkeypatch.setattr(check_peers, "check", lambda names, hang_s: [row])
    monkeypatch.setattr(sys, "argv", ["check_peers.py", *strict])
    assert check_peers.main() == code
    assert "naive" in capsys.readouterr().err


def test_a_job_that_hangs_is_ended_whole(tmp_path):
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc to count the processes of a session")
    # Like Open MPI's ranks: in a process group of its own, deaf to SIGTERM.
    program = (
        "import os, signal, time\n"
        "if os.fork() == 0:\n"
        "    os.setpgid(0, 0)\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(60)\n"
    )
    process = check_peers.start([sys.executable, "-c", program], tmp_path / "log", dict(os.environ))
    deadline = time.monotonic() + 30
    while len(check_peers.session_members(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert check_peers.wait_all([process], 0.5) is False
    time.sleep(0.2)  # the kernel takes a moment to end a killed process
    assert check_peers.session_members(process.pid) == []
