"""How this process was started, so that help and hints name commands that exist.

The same programs are started as ``tf-dist NAME``, as ``python -m tf_dist NAME``, and in a checkout as
``python scripts/NAME.py``. Texts in the sources say ``tf-dist NAME``; `spelled` puts in what was typed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CONSOLE_SCRIPT = "tf-dist"
MODULE = "python -m tf_dist"
# Commands that a checkout has a script for.
SCRIPTS = ("train", "generate", "evaluate", "prepare", "bench")
FOLDER = Path(__file__).resolve().parents[1] / "scripts"
COMMAND = re.compile(rf"(-- )?\b{CONSOLE_SCRIPT} ([a-z]+|COMMAND)\b")


def command(name: str = "") -> str:
    """What to type for one of our programs; for all of them where ``name`` is empty."""
    started, script = _started_by(), f"{name}.py"
    if started == "script" and name in SCRIPTS:
        return f"python scripts/{script}"
    return f"{CONSOLE_SCRIPT if started == 'console' else MODULE} {name}".rstrip()


def program(name: str) -> str:
    """The name in the line of usage: ``train.py`` or ``tf-dist train``."""
    return command(name).removeprefix("python scripts/")


def spelled(text: str) -> str:
    """A text that says ``tf-dist NAME``, with what to type for it here.

    After ``--``, where `run` takes a job for Python, it is a script or ``tf-dist NAME``.
    """

    def as_typed(found: re.Match[str]) -> str:
        dashes, name = found[1] or "", found[2]
        if not dashes:
            return command(name)
        by_script = _started_by() != "console" and name in SCRIPTS and FOLDER.is_dir()
        return dashes + (f"scripts/{name}.py" if by_script else f"{CONSOLE_SCRIPT} {name}")

    return COMMAND.sub(as_typed, text)


def _started_by() -> str:
    started = Path(sys.argv[0] if sys.argv else "")
    if started.name == CONSOLE_SCRIPT:
        return "console"
    if started.name == "__main__.py" and started.parent.name == "tf_dist":
        return "module"
    # A script of ours, or of the user's: then what there is beside this package.
    return "script" if (FOLDER / "train.py").is_file() else "console"
