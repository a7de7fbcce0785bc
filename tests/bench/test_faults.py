"""Who dies when, and the table of canned campaigns."""

import json
import subprocess
import sys

import pytest

from tf_dist.bench import faults, faults_of_files, faults_of_numbers, faults_on_ranks
from tf_dist.faults.spec import parse

CALM = {"seed": 0, "weights_sha256": "same", "recoveries": []}


def died(*recoveries, sha="same"):
    found = [{"lost": lost, "step": 3, "ms": ms} for lost, ms in recoveries]
    return {"seed": 1, "weights_sha256": sha, "recoveries": found}


@pytest.mark.parametrize("seed", range(20))
def test_one_is_left(seed):
    deaths = faults_on_ranks.drawn(4, 3, seed)
    assert len(deaths) == 3 and set(deaths) <= set(range(4))
    assert all(1 <= one.step < faults_on_ranks.STEPS - 2 for one in deaths.values())
    assert deaths == faults_on_ranks.drawn(4, 3, seed)


def test_rank_0_is_one_like_any_other():
    counts = [sum(rank in faults_on_ranks.drawn(4, 1, seed) for seed in range(400)) for rank in range(4)]
    assert min(counts) > 60 and sum(counts) == 400


def test_other_weights_and_no_weights_do_not_count():
    runs = [died(([2], 4.0), ([0, 1], 8.0)), died(([1], 100.0), sha="other"), {"seed": 3}]
    job = {"ranks": 4, "calm": CALM, "runs": runs}
    cells = faults.table([job]).splitlines()[-1].split()
    assert cells == ["4", "1", "of", "3", "3", "1", "6.0", "8.0"]


def test_without_a_calm_run_nothing_counts():
    assert faults.sound({"ranks": 4, "calm": {"seed": 0}, "runs": [{"seed": 1}, CALM]}) == []


def test_damaged_checkpoints_are_noticed_and_do_no_harm():
    # In a process of its own: what forks should have no threads.
    command = [sys.executable, "-m", faults_of_files.__name__, "60", "300"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert (
        found["kills"]["calls"] > 6 and found["flips"]["tried"] == 60 and found["manifests"]["refused"] > 100
    )
    assert faults_of_files.sound(found)
    assert "60 of 60" in faults_of_files.table(found)


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
    assert faults_of_files.sound(found)
    found[campaign] |= change
    assert not faults_of_files.sound(found)


def test_faults_of_numbers_are_those_of_the_injector():
    drawn = [faults_of_numbers.drawn(kind, 3, seed) for kind in faults_of_numbers.KINDS for seed in range(99)]
    found = [fault for text in drawn for fault in parse(text)]
    assert {fault.rank for fault in found} == {0, 1, 2}
    assert {fault.phase for fault in found} == {"step", "forward", "gradient", "update"}
    assert all(2 <= fault.step < fault.step + fault.times <= faults_of_numbers.STEPS for fault in found[:99])
    assert drawn[:99] == [faults_of_numbers.drawn("nan", 3, seed) for seed in range(99)]


@pytest.mark.parametrize("what", ["same", "named", "done"])
def test_what_is_not_sound_of_numbers(what):
    good = {"same": True, "named": True, "done": True}
    found = {"nan": [good, good], "bitflip": [good]}
    assert faults_of_numbers.sound(found)
    found = {"nan": [good, {**good, what: False}], "bitflip": [good]}
    assert not faults_of_numbers.sound(found)
    words = faults_of_numbers.table(found)
    assert "1 of 2" in words and "steps taken again" in words
