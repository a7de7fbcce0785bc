"""Train Keras models on MPI ranks, restart jobs after failures, inspect checkpoints, clean up.

    tf-dist train                              # a small Transformer
    mpirun -np 2 tf-dist train --model lstm    # on two ranks
    tf-dist generate --prompt 'def '
    tf-dist run -np 4 -- tf-dist train --run-dir runs/long
    tf-dist checkpoint verify runs/latest
    tf-dist doctor

`tf-dist COMMAND --help` documents each.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tf_dist import terminal
from tf_dist.comm.runtime import launch
from tf_dist.errors import UsageError
from tf_dist.flags import Parser
from tf_dist.invocation import command, spelled
from tf_dist.spelling import did_you_mean
from tf_dist.version import __version__

# Each is a module beside this one.
COMMANDS = {
    "train": "train a language model; under mpirun on all ranks",
    "generate": "generate text from a trained model",
    "chat": "continue what you type, in the terminal or on a page",
    "evaluate": "loss, perplexity and bits per byte of a trained model",
    "lm-eval": "lm-evaluation-harness on a trained model; under mpirun on all ranks",
    "prepare": "tokenize text on disk",
    "run": "run a job, and restart it after failures",
    "checkpoint": "verify, show, convert or export checkpoints",
    "doctor": "list or remove leftovers of dead jobs",
    "bench": "benchmarks",
}


def console() -> int:
    """What the console script ``tf-dist`` calls."""
    return main(sys.argv[1:])


def main(argv: Sequence[str]) -> int:
    """Hand the other words to the command that the first one names; its exit code.

    Raises:
        Exception: of `train` and `evaluate`, whose ranks end together (`tf_dist.comm.runtime.job_exit`).
    """
    if argv and argv[0] in COMMANDS:
        code: int = importlib.import_module("tf_dist.cli." + argv[0].replace("-", "_")).main(list(argv[1:]))
        return code
    launch.exit_above_rank_0()
    return terminal.exit_code_of(lambda: _answer(argv))


def _answer(argv: Sequence[str]) -> int:
    """Answer ``--help`` and ``--version``.

    Raises:
        UsageError: no command, or an unknown one.
    """
    parser = Parser(spelled(__doc__ or ""), "COMMAND ...", command())
    parser.add_argument("--version", action="version", version=__version__)
    listed = parser.add_argument_group("commands")
    for name, text in COMMANDS.items():
        listed.add_argument(name, nargs="?", help=text)
    try:
        if argv and not argv[0].startswith("-"):
            near = did_you_mean(argv[0], list(COMMANDS))
            raise UsageError(f"unknown command {argv[0]!r}{near} (see --help)")
        parser.parse_args(list(argv))
        raise UsageError(f"which command? {', '.join(COMMANDS)} (see --help)")
    except UsageError:
        terminal.write_error(parser.format_usage().rstrip("\n"))
        raise
    except SystemExit:  # --help or --version was answered
        return 0
