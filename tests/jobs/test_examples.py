"""Keras's official examples, shrunk and in words of our own (tests/examples), on 2 and 4 ranks.

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
# Of four ranks some have no row of the last batch: kernels that fail on no rows, states of metrics, slices.
FOUR_RANKS = [
    "gan", "masked_language_model", "miniature_gpt", "ocr_ctc", "simclr", "speech_ctc", "text_transformer",
    "timeseries_transformer", "transfer_learning", "vae",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(launcher, tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("examples"))
    made.plain(SCRIPTS)
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


@pytest.mark.parametrize("ranks", [1, 2, 4] if ALL else [2, 4])  # one rank is Keras by itself
def test_ranks_train_what_one_process_trains(runs, ranks):
    scripts = [script for script in SCRIPTS if ALL or ranks == 2 or script.stem in FOUR_RANKS]
    runs.ranks(scripts, ranks)
    assert not wrong(runs.verdicts(scripts, ranks), ranks)


def test_there_are_enough():
    assert len(SCRIPTS) >= 14
    assert {script.stem for script in SCRIPTS} >= set(FOUR_RANKS)
    assert REFUSED_OVER_RANKS.keys() <= {script.stem for script in SCRIPTS}
