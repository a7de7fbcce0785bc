"""Who dies when, and the table of canned campaigns."""

import json
import subprocess
import sys

import pytest

from tf_dist.bench.faults import campaign, culprits, files, in_place, jobs, numbers, on_ranks
from tf_dist.faults.spec import parse

CALM = {"seed": 0, "weights_sha256": "same", "recoveries": []}


def died(*recoveries, sha="same"):
    found = [{"lost": lost, "step": 3, "ms": ms} for lost, ms in recoveries]
    return {"seed": 1, "weights_sha256": sha, "recoveries": found}


@pytest.mark.parametrize("seed", range(20))
def test_one_is_left(seed):
    deaths = on_ranks.drawn(4, 3, seed)
    assert len(deaths) == 3 and set(deaths) <= set(range(4))
    assert all(1 <= one.step < on_ranks.STEPS - 2 for one in deaths.values())
    assert deaths == on_ranks.drawn(4, 3, seed)


def test_rank_0_is_one_like_any_other():
    counts = [sum(rank in on_ranks.drawn(4, 1, seed) for seed in range(400)) for rank in range(4)]
    assert min(counts) > 60 and sum(counts) == 400


def test_other_weights_and_no_weights_do_not_count():
    runs = [died(([2], 4.0), ([0, 1], 8.0)), died(([1], 100.0), sha="other"), {"seed": 3}]
    job = {"ranks": 4, "calm": CALM, "runs": runs}
    cells = in_place.table([job]).splitlines()[-1].split()
    assert cells == ["4", "1", "of", "3", "3", "1", "6.0", "8.0"]


def test_without_a_calm_run_nothing_counts():
    assert in_place.sound({"ranks": 4, "calm": {"seed": 0}, "runs": [{"seed": 1}, CALM]}) == []


def test_damaged_checkpoints_are_noticed_and_do_no_harm():
    # In a process of its own: what forks should have no threads.
    command = [sys.executable, "-m", files.__name__, "60", "300"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (
        found["kills"]["calls"] > 6 and found["flips"]["tried"] == 60 and found["manifests"]["refused"] > 100
    )
    assert files.sound(found)
    assert "60 of 60" in files.table(found)


@pytest.mark.parametrize(
    ("campaign", "change"),
    [
        ("kills", {"sound": 8}),
        ("flips", {"noticed": 59}),
        ("manifests", {"read": 0}),
        ("manifests", {"harm": ["exec"]}),
    ],
)
def test_what_is_not_sound(campaign, change):
    found = {
        "kills": {"calls": 9, "sound": 9, "new": 1},
        "flips": {"tried": 60, "noticed": 60, "harmless": 0},
        "manifests": {"tried": 10, "refused": 8, "read": 2, "other errors": 0, "harm": []},
    }
    assert files.sound(found)
    found[campaign] |= change
    assert not files.sound(found)


def test_faults_of_numbers_are_those_of_the_injector():
    drawn = [numbers.drawn(kind, 3, seed) for kind in numbers.KINDS for seed in range(99)]
    found = [fault for text in drawn for fault in parse(text)]
    assert {fault.rank for fault in found} == {0, 1, 2}
    assert {fault.phase for fault in found} == {"step", "forward", "gradient", "update"}
    assert all(2 <= fault.step < fault.step + fault.times <= numbers.STEPS for fault in found[:99])
    assert drawn[:99] == [numbers.drawn("nan", 3, seed) for seed in range(99)]


@pytest.mark.parametrize("what", ["same", "named", "done"])
def test_what_is_not_sound_of_numbers(what):
    good = {"same": True, "named": True, "done": True}
    found = {"nan": [good, good], "bitflip": [good]}
    assert numbers.sound(found)
    found = {"nan": [good, {**good, what: False}], "bitflip": [good]}
    assert not numbers.sound(found)
    words = numbers.table(found)
    assert "1 of 2" in words and "steps taken again" in words


def test_faults_take_turns_and_anybody_may_have_them():
    found = [culprits.drawn(seed) for seed in range(300)]
    assert [one.name for one in found[:5]] == list(culprits.FAULTS)
    assert {one.rank for one in found} == set(range(culprits.RANKS))
    assert {one.phase for one in found} == set(culprits.PHASES)
    assert all(1 <= one.step < culprits.STEPS - 1 for one in found)


@pytest.mark.parametrize(
    ("code", "ended", "output", "sound"),
    [
        (70, 103.0, "FAULT AT 100.5\nrank 1: Traceback", True),
        (139, 103.0, "FAULT AT 100.5\nprterun noticed that process rank 1 with PID 7 exited", True),
        (3, 103.0, "FAULT AT 100.5\n   Process name: [prterun-host-7@1,1]", True),
        (0, 103.0, "FAULT AT 100.5\nrank 1 is gone", False),
        (-9, 103.0, "FAULT AT 100.5\nrank 1 is slow", False),  # it hung, and was killed
        (70, 203.0, "FAULT AT 100.5\nrank 1: Traceback", False),
        (70, 103.0, "FAULT AT 100.5\nrank 0 waits, rank 11 not", False),
        (70, 103.0, "rank 1 is slow\nFAULT AT 100.5\n", False),
        (70, 103.0, "rank 1: Traceback", False),
    ],
)
def test_a_job_has_to_end_in_time_and_name_the_rank(code, ended, output, sound):
    fault = culprits.HangFault("exception", 1, 3, "before")
    assert culprits.judged(fault, code, ended, output)["sound"] is sound


def test_one_job_that_does_not_is_enough():
    jobs = [
        {"name": "exception", "sound": True, "seconds": 1.0, "code": 70},
        {"name": "SIGSTOP", "sound": False, "code": -9},
    ]
    assert not culprits.sound(jobs) and culprits.sound(jobs[:1])
    lines = culprits.table(jobs).splitlines()
    assert lines[1].split() == ["exception", "1", "of", "1", "1.0", "1.0", "70"]
    assert "0 of 1" in lines[4] and lines[4].endswith("-9")


def test_parts_that_are_wanted_are_done_and_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(campaign.runner, "FOLDER", tmp_path)
    parts = {
        "files": lambda options: ({"seeds": options.get("seeds")}, "a table", True),
        "numbers": lambda options: ([], "another", False),
    }
    monkeypatch.setattr(campaign, "PARTS", parts)
    assert (
        campaign.main(["files", "seeds=3"]) == 0 and campaign.main(["numbers"]) == 1 and campaign.main() == 1
    )
    said = capsys.readouterr().out
    assert said.count("a table") == 2 and said.count("another") == 2
    newest = max((tmp_path / "faults").glob("*.json"))
    assert json.loads(newest.read_text())["numbers"] == []
    assert campaign.main(["flies"]) == 64 and "They are files, numbers" in capsys.readouterr().err


def test_lines_of_jobs():
    lines = [
        jobs.Line("killed", 3, 3, "1.0 s"),
        jobs.Line("resumed", 15, 16, "not: 2 to 1"),
    ]
    assert [line.sound for line in lines] == [True, False]
    assert jobs.table(lines).splitlines()[-1].split("  ")[-1] == "not: 2 to 1"
    assert set(jobs.PARTS) == set(jobs.SEEDS)


def test_a_job_that_did_not_end_has_no_weights():
    status = {"state": "failed", "weights_sha256": "old"}
    assert jobs.Ended(70, status, [], 1.0).weights is None
    assert jobs.Ended(0, {**status, "state": "done"}, [], 1.0).weights == "old"
