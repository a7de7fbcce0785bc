"""Keras's official examples, shrunk and in words of our own (tests/examples): some of them on 2 ranks.

All of them on 1, 2 and 4 ranks: ``make examples``.
"""

import os
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


# ``make examples`` asks for all of them.
ALL = os.environ.get("TF_DIST_EXAMPLES") == "all"
# Two optimizers, a refusal, CTC; tests/mpi/test_fit_objective_mpi.py has masks, tables of positions and more.
IN_MAKE_TEST = ["gan", "image_captioning", "ocr_ctc"]


CHOSEN = [script for script in SCRIPTS if ALL or script.stem in IN_MAKE_TEST]


@pytest.fixture(scope="module")
def runs(launcher, tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("examples"), launcher.warm_python())
    made.plain(CHOSEN)
    return made


def wrong(verdicts, ranks):
    """Those that are neither what is wanted of them nor refused as they should be."""
    found = {}
    for name, verdict in verdicts.items():
        refusal = REFUSED_OVER_RANKS.get(name) if ranks > 1 else None
        wanted = EQUAL if refusal is None else REFUSED
        if verdict.word != wanted or (refusal or "") not in verdict.detail:
            found[name] = verdict
    return found


# One rank is Keras by itself. Ranks without a row of the last batch: tests/mpi/test_fit_objective_mpi.py.
@pytest.mark.parametrize("ranks", [1, 2, 4] if ALL else [2])
def test_ranks_train_what_one_process_trains(runs, ranks):
    runs.ranks(CHOSEN, ranks)
    assert not wrong(runs.verdicts(CHOSEN, ranks), ranks)


def test_there_are_enough():
    assert len(SCRIPTS) >= 14
    assert {script.stem for script in SCRIPTS} >= set(IN_MAKE_TEST)
    assert REFUSED_OVER_RANKS.keys() <= {script.stem for script in SCRIPTS}
