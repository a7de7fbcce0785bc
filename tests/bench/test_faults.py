"""Who dies when, and the table of canned campaigns."""

import pytest

from tf_dist.bench import faults, faults_on_ranks

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
