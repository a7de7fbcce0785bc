"""List leftovers of dead jobs in this machine's shared memory and temporary folders.

    tf-dist doctor
    tf-dist doctor --clean

Exit codes: 0; 70 something could not be read, or removed.
"""

from __future__ import annotations

from collections.abc import Sequence

from tf_dist.cli.questions import exit_code_of, parsed, shown
from tf_dist.errors import TfDistError
from tf_dist.flags import Parser
from tf_dist.invocation import command, spelled
from tf_dist.ops import doctor


def main(argv: Sequence[str]) -> int:
    """Look, and remove what is left where that is wanted; the exit code."""
    return exit_code_of(lambda: _doctor(argv))


def _doctor(argv: Sequence[str]) -> int:
    parser = Parser(spelled(__doc__ or ""), "[--clean]", command("doctor"))
    parser.add_argument("--clean", action="store_true", help="remove it")
    clean = parsed(parser, argv).clean
    return shown("doctor", lambda: _answer(clean))


def _answer(clean: bool) -> tuple[str, int]:
    lines, well = doctor.report(doctor.folders(), clean)
    return "\n".join(lines), 0 if well else TfDistError.exit_code
