"""Keras's official examples, shrunk and in words of our own (tests/examples), on 1, 2 and 4 ranks."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))

from jobs import Runs
from verdict import EQUAL, REFUSED

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
# What a train_step of one's own computes over a batch, and no sum over ranks gives.
OBJECTIVE = "is not that of one process with the global batch"
REFUSED_OVER_RANKS = {
    "image_captioning": OBJECTIVE,  # divides by the number of words in its batch
    "metric_learning": OBJECTIVE,  # compares the rows of a batch with each other
    "simclr": OBJECTIVE,  # the same
}


@pytest.fixture(scope="module")
def runs(launcher, tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("examples"))
    made.plain(SCRIPTS)
    return made


@pytest.mark.parametrize("ranks", [2, 4])  # one rank is Keras by itself
def test_ranks_train_what_one_process_trains(runs, ranks):
    runs.ranks(SCRIPTS, ranks)
    wrong = {}
    for name, verdict in runs.verdicts(SCRIPTS, ranks).items():
        refusal = REFUSED_OVER_RANKS.get(name) if ranks > 1 else None
        wanted = EQUAL if refusal is None else REFUSED
        if verdict.word != wanted or (refusal or "") not in verdict.detail:
            wrong[name] = verdict
    assert not wrong


def test_there_are_enough():
    assert len(SCRIPTS) >= 14
    assert REFUSED_OVER_RANKS.keys() <= {script.stem for script in SCRIPTS}
