"""Run `mpirun -np N python JOB`, and restart it after failures from the newest valid checkpoint.

    tf-dist run -np 4 -- tf-dist train --run-dir runs/long
    tf-dist run -np 8 --hostfile hosts -- tf-dist train

Options not listed here are passed to mpirun. Hosts of --host or --hostfile that do not answer after a
failure are left out, with their ranks. SIGTERM, SIGINT and SIGUSR1 are forwarded, and end it. The exit
code is that of the last job.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tf_dist import terminal
from tf_dist.cli.questions import exit_code_of, parsed
from tf_dist.comm.runtime.log_handlers import shown_by
from tf_dist.errors import UsageError
from tf_dist.flags import Parser
from tf_dist.invocation import CONSOLE_SCRIPT, command, spelled
from tf_dist.ops.hostfile import Launch
from tf_dist.ops.supervisor import USUAL, Patience, Restarts, own_mpirun, with_run_dir
from tf_dist.run.status import correct


def main(argv: Sequence[str]) -> int:
    """Start a job until it is done; the exit code."""
    return exit_code_of(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    own, job = _divided(argv)
    parser = _parser()
    flags = parsed(parser, own, known_only=False)
    if not job:
        terminal.write_error(parser.format_usage().rstrip("\n"))
        example = spelled("run -np 4 -- tf-dist train --steps 1000")
        raise UsageError(f"run: give the job after --, as in: {example} (see --help)")
    words, run_dir = with_run_dir(for_python(job))
    launch = Launch(words, flags.np, flags.min_ranks, flags.mpirun, flags.others)
    with shown_by(terminal.write_error, "tf_dist run: %(message)s"):
        code = Restarts(launch.command, run_dir, Patience(max(1, flags.tries))).run()
    correct(run_dir)
    return code


def _parser() -> Parser:
    parser = Parser(spelled(__doc__ or ""), "[options] -- JOB ...", command("run"))
    parser.add_argument("-np", type=int, default=2, metavar="N", help="ranks [2]")
    parser.add_argument(
        "--min-ranks",
        type=int,
        default=1,
        metavar="N",
        help="minimum ranks when hosts are lost [1]",
    )
    parser.add_argument(
        "--tries", type=int, default=USUAL.tries, metavar="N",
        help=f"starts in a row without a new checkpoint [{USUAL.tries}]",
    )  # fmt: skip
    parser.add_argument("--mpirun", default=own_mpirun(), metavar="PATH", help="the launcher")
    return parser


def for_python(job: Sequence[str]) -> list[str]:
    """The words of a job as Python takes them: ``tf-dist train`` is a module of ours, a script is itself."""
    if Path(job[0]).name == CONSOLE_SCRIPT:
        return ["-m", "tf_dist", *job[1:]]
    return list(job)


def _divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before ``--``, and after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return list(argv[:at]), list(argv[at + 1 :])
