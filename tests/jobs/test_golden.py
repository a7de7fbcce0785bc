"""Trainings of every kind against those of earlier releases: the same weights, bit for bit.

``python tests/golden/record.py`` writes the hashes anew.
"""

import sys
from pathlib import Path

import pytest
from extended import EVERYTHING

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

from cases import CASES, RANKS
from runs import environment, hashes, recorded

# `make test` has those of one and two ranks, without what other tests show: tests/mpi has uneven shares and
# pipelines and XLA, test_grids.py the grids, test_updates.py the strategies that are left out here.
REPEATED = {
    *("np2 transformer zero 1 messages", "np2 lstm allreduce", "np1 lstm gossip"),
    *("np2 lstm bfloat16 zero 2", "np1 lstm bfloat16", "np2 transformer sgd zero 1", "np1 transformer sgd"),
    *("np2 transformer pipeline", "np2 transformer gpipe", "np2 lstm zero-bubble", "np2 lstm interleaved"),
    *("np2 transformer tensor", "np2 lstm tensor zero 1", "np2 transformer sequence"),
    *("np2 transformer local-sgd", "np2 transformer easgd", "np2 transformer powersgd"),
    *("np2 transformer diloco delay", "np1 transformer diloco", "np1 transformer diloco resumed"),
    *("np1 transformer 1x2x2 as one", "np2 transformer xla", "np1 transformer xla"),
}
CHOSEN = [case for case in CASES if EVERYTHING or (case.ranks < 3 and case.key not in REPEATED)]
GROUPS = {one.alike: [case.key for case in CHOSEN if case.alike == one.alike] for one in CHOSEN if one.alike}
if not EVERYTHING:  # a group of two, of which one is on four ranks, is none
    GROUPS = {group: keys for group, keys in GROUPS.items() if len(keys) > 1}
# Four ranks with 15 models on one core.
LONG_S = 900


@pytest.fixture(scope="module")
def found(launcher, tmp_path_factory):
    """The SHA-256 of the weights of each run, by key; one launch for each number of ranks."""

    def start(ranks, flags, cwd):
        return launcher.several(ranks, "train.py", flags, cwd=cwd).wait(LONG_S)

    return hashes(start, tmp_path_factory.mktemp("golden"), CHOSEN)


@pytest.mark.parametrize("group", GROUPS)
def test_runs_that_are_one_training_have_the_same_bits(found, group):
    """On any machine: the number of ranks, who takes the step and a resume change nothing."""
    of_group = {key: found[key] for key in GROUPS[group]}
    assert len(of_group) > 1
    assert len(set(of_group.values())) == 1, of_group


def test_groups_differ_from_each_other(found):
    """Else runs would not have done what their flags say."""
    of_each = {group: found[keys[0]] for group, keys in GROUPS.items()}
    assert len(set(of_each.values())) == len(of_each), of_each


def test_weights_are_those_that_were_recorded(found):
    before, here = recorded()["environment"], environment()
    if differ := [name for name in {**before, **here} if before.get(name) != here.get(name)]:
        pytest.skip(f"recorded with another {', '.join(differ)}: runs were compared with each other alone")
    weights = recorded()["weights"]
    changed = [key for key in found if weights.get(key) != found[key]]
    assert not changed, f"{len(changed)} of {len(found)} runs have other weights than were recorded"


def test_every_run_is_recorded():
    keys = [case.key for case in CASES]
    assert len(set(keys)) == len(keys)
    assert set(keys) >= REPEATED
    assert sorted(keys) == list(recorded()["weights"])
    assert {case.ranks for case in CASES} == set(RANKS)
    before = [case.resumes for case in CASES if case.resumes]
    assert set(before) <= set(keys)


def test_no_run_is_resumed_before_it_was_made():
    assert {case.resumes for case in CHOSEN if case.resumes} <= {case.key for case in CHOSEN}
    launch = {case.key: RANKS.index(case.ranks) for case in CASES}
    assert all(launch[case.resumes] < launch[case.key] for case in CASES if case.resumes)
