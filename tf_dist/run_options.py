"""Options of an existing run, where a command line goes on with it: what it does not say is as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tf_dist.choices import BELONGS_TO
from tf_dist.config import BPE_DEFAULT_VOCAB
from tf_dist.errors import UsageError

# Of a start, not of a run: --resume never must not be repeated by a start that only names the folder.
OF_A_START = ("run_dir", "resume", "progress")
# Of two options that say the same, the one that is given puts the other out of force.
INSTEAD = {"steps": "epochs", "epochs": "steps"}


def still_hold(of_run: Mapping[str, Any], given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The options of a run that hold for a command line.

    Args:
        of_run: its config.yaml, as read.
        given: the options among the flags.
        source: what to call the file in an error.

    Raises:
        UsageError: the run's model is a user's function, and no flag names it: a file does not get code run.
    """
    model = str(of_run.get("model", ""))
    if ":" in model and "model" not in given:
        raise UsageError(
            f"{source} names the model {model!r}: code of yours, or of whoever wrote that file. If it is "
            f"yours, say so: --model {model}"
        )
    held = {name: value for name, value in of_run.items() if name not in OF_A_START}
    for name, other in INSTEAD.items():
        if given.get(name):
            held.pop(other, None)
    for name, (chooser, wanted) in BELONGS_TO.items():
        if chooser in given and given[chooser] not in wanted:
            held.pop(name, None)
    if given.get("pipeline_parallel", held.get("pipeline_parallel")) != held.get("pipeline_parallel"):
        held.pop("pipeline_cuts", None)
    # config.yaml has the size that came of it, and tokens were prepared by what was asked for.
    if held.get("tokenizer") != "bpe" or held.get("vocab_size") == BPE_DEFAULT_VOCAB:
        held.pop("vocab_size", None)
    return held
