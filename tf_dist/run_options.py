"""Options of an existing run when a command line resumes it: what is not given stays as it was.

A run folder may have come from elsewhere: its file gives values, and gets no code run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tf_dist import terminal
from tf_dist.config import BPE_DEFAULT_VOCAB, FIELDS, on_resume
from tf_dist.errors import LaunchError
from tf_dist.strategies.registry import FLAT_OPTIONS
from tf_dist.untrusted_files import shown

# Keys of older files, and what they are called now.
RENAMED = {old: name for name, field in FIELDS.items() for old in field.metadata["formerly"]}
# Options that may name a user's code.
CODE = tuple(name for name, field in FIELDS.items() if field.metadata["names_code"])
# Of two options that say the same, the one that is given puts the other out of force.
INSTEAD = {"steps": "epochs", "epochs": "steps"}
# Who has one of these beside it is a run's file.
OF_A_RUN = ("checkpoints", "status.json", "metrics.jsonl", "in-use.json", "tokenizer.json")


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options that an older version has written, by the names that they have now."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def still_hold(of_run: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that hold for a command line.

    Args:
        of_run: its config.yaml, as read.
        given: the options among the flags.
    """
    # --resume never must not be repeated by a start that only names the folder.
    of_a_start = on_resume("of a start")
    held = {name: value for name, value in of_run.items() if name not in of_a_start}
    for name, other in INSTEAD.items():
        if given.get(name):
            held.pop(other, None)
    for name, option in FLAT_OPTIONS.items():
        if option.chooser in given and given[option.chooser] not in option.owners:
            held.pop(name, None)
    if given.get("pipeline_parallel", held.get("pipeline_parallel")) != held.get("pipeline_parallel"):
        held.pop("pipeline_cuts", None)
    # config.yaml has the size that came of it, and tokens were prepared by what was asked for.
    if held.get("tokenizer") != "bpe" or held.get("vocab_size") == BPE_DEFAULT_VOCAB:
        held.pop("vocab_size", None)
    return held


def check_named(name: str, named: str, source: str, option: str = "model") -> None:
    """Let code of a user run only where this command line names it, never because a run's file does.

    Args:
        name: what the file says.
        named: by the flag on the command line; empty: nothing.
        source: the file.
        option: "model" or "strategy".

    Raises:
        LaunchError: the file names code that the command line does not.
    """
    if ":" in name and name != named:
        others = f"not {shown(named)}" if named else "and code runs only where the command line names it"
        made = "the model is made by" if option == "model" else f"the {option} is"
        raise LaunchError(
            f"{source} says that {made} {shown(name)}, {others}. If you trust that code, add "
            f"--{option} {shlex.quote(terminal.printable(name)[:200])}"
        )


def lies_in_a_run(path: Path) -> bool:
    """Whether a file lies in a run folder, which may have come from elsewhere: then it is data."""
    folders = (path.parent, Path(os.path.realpath(path)).parent)
    return any(os.path.lexists(folder / name) for folder in folders for name in OF_A_RUN)


def in_its_own_folder(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """The options of a run, meant for the folder that they lie in, wherever that has been since.

    ``resume`` held for the start that wrote them: to do it again would set aside what was done since.
    """
    if path.name != "config.yaml" or not os.path.lexists(path.parent / "checkpoints"):
        return values
    kept = {name: value for name, value in values.items() if name != "resume"}
    return {**kept, "run_dir": os.path.relpath(path.parent)} if "run_dir" in kept else kept
