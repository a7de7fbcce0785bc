"""Restart jobs after failures, inspect checkpoints, clean up; without MPI and TensorFlow.

    python -m tf_dist run -np 4 -- scripts/train.py --run-dir runs/long
    python -m tf_dist checkpoint verify runs/latest
    python -m tf_dist doctor

`python -m tf_dist COMMAND --help` documents each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tf_dist import doctor, progress, terminal
from tf_dist.errors import CheckpointError, TfDistError, UsageError
from tf_dist.flags import Parser
from tf_dist.hosts import Launch
from tf_dist.restarts import USUAL, Patience, Restarts, own_mpirun, with_run_dir
from tf_dist.training import convert, inspect_checkpoint
from tf_dist.training.status import correct

RUN = """Run `mpirun -np N python JOB`, and restart it after failures from the newest valid checkpoint.

    python -m tf_dist run -np 4 -- scripts/train.py --run-dir runs/long
    python -m tf_dist run -np 8 --hostfile hosts -- scripts/train.py

Options not listed here are passed to mpirun. Hosts of --host or --hostfile that do not answer after a
failure are left out, with their ranks. SIGTERM, SIGINT and SIGUSR1 are forwarded, and end it. The exit
code is that of the last job."""
CHECKPOINT = """Verify or show checkpoints; export weights to other formats, or import them.

    python -m tf_dist checkpoint verify runs/latest     # checks every CRC
    python -m tf_dist checkpoint show runs/latest       # the newest valid one
    python -m tf_dist checkpoint convert runs/latest model.keras
    python -m tf_dist checkpoint convert model.safetensors runs/new

Export: TARGET ends in .safetensors, .weights.h5 or .keras. Import: PATH does, and TARGET is a run folder with
a config.yaml and no checkpoints.

Exit codes: 0; 64 usage; 77 a checkpoint is damaged (verify), or none is usable."""
DOCTOR = """List leftovers of dead jobs in this machine's shared memory and temporary folders.

    python -m tf_dist doctor
    python -m tf_dist doctor --clean

Exit codes: 0; 70 something could not be read, or removed."""


def main(argv: list[str]) -> int:
    """Answer one question; the exit code."""
    return terminal.exit_code_of(lambda: _answer(argv))


def _answer(argv: list[str]) -> int:
    parser, commands = _parser()
    own, job = _divided(argv)
    try:
        arguments, others = parser.parse_known_args(own)
        if arguments.topic == "run" and not job:
            parser.error("run: give the job after --, as in: run -np 4 -- scripts/train.py --steps 1000")
        if others and arguments.topic != "run":
            commands[arguments.topic].error(f"unknown: {' '.join(others)}")
    except UsageError:
        terminal.write_error(parser.format_usage().rstrip("\n"))
        raise
    except SystemExit:  # --help was answered
        return 0
    if arguments.topic == "run":  # the job shows its own
        return _run(arguments, others, job)
    progress.begin()
    with progress.task(f"{arguments.topic} {getattr(arguments, 'question', '')}".strip()):
        said, code = (_doctor if arguments.topic == "doctor" else _checkpoint)(arguments)
    progress.end()
    terminal.write(said)
    return code


def _parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the command line, and that of each command."""
    parser = Parser(__doc__ or "", "{run,checkpoint,doctor} ...", "python -m tf_dist")
    topics = parser.add_subparsers(dest="topic", required=True, prog="python -m tf_dist", metavar="COMMAND")
    run = topics.add_parser(
        "run",
        help="run a job, and restart it after failures",
        description=RUN,
        usage="[options] -- JOB ...",
    )
    run.add_argument("-np", type=int, default=2, metavar="N", help="ranks [2]")
    run.add_argument(
        "--min-ranks",
        type=int,
        default=1,
        metavar="N",
        help="minimum ranks when hosts are lost [1]",
    )
    run.add_argument(
        "--tries", type=int, default=USUAL.tries, metavar="N",
        help=f"starts in a row without a new checkpoint [{USUAL.tries}]",
    )  # fmt: skip
    run.add_argument("--mpirun", default=own_mpirun(), metavar="PATH", help="the launcher")
    checkpoint = topics.add_parser(
        "checkpoint", help="verify, show or convert checkpoints", description=CHECKPOINT,
        usage="{verify,show,convert} PATH [TARGET]",
    )  # fmt: skip
    checkpoint.add_argument("question", choices=("verify", "show", "convert"), help="see above")
    checkpoint.add_argument(
        "path", type=Path, metavar="PATH", help="a run folder, its checkpoints folder, or a checkpoint"
    )
    checkpoint.add_argument(
        "target", type=Path, nargs="?", metavar="TARGET", help="convert: destination file or run folder"
    )
    checkpoint.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|PATH", help="convert: which one [latest]"
    )
    checkpoint.add_argument(
        "--model", default="", metavar="PACKAGE.MODULE:FUNCTION",
        help="convert: function that builds the model, if it is your own code",
    )  # fmt: skip
    health = topics.add_parser(
        "doctor", help="list or remove leftovers of dead jobs", description=DOCTOR, usage="[--clean]"
    )
    health.add_argument("--clean", action="store_true", help="remove it")
    return parser, {"run": run, "checkpoint": checkpoint, "doctor": health}


def _run(arguments: argparse.Namespace, others: list[str], job: list[str]) -> int:
    words, run_dir = with_run_dir(job)
    launch = Launch(words, arguments.np, arguments.min_ranks, arguments.mpirun, others, _say)
    code = Restarts(launch.command, run_dir, Patience(max(1, arguments.tries)), _say).run()
    correct(run_dir)
    return code


def _doctor(arguments: argparse.Namespace) -> tuple[str, int]:
    lines, well = doctor.report(doctor.folders(), arguments.clean)
    return "\n".join(lines), 0 if well else TfDistError.exit_code


def _checkpoint(arguments: argparse.Namespace) -> tuple[str, int]:
    """What there is to say, and the exit code."""
    if arguments.question == "convert":
        if arguments.target is None:
            raise UsageError("convert takes two paths, as in: convert runs/latest model.safetensors")
        return convert.convert(arguments.path, arguments.target, arguments.checkpoint, arguments.model), 0
    if arguments.question == "show":
        return inspect_checkpoint.shown(arguments.path), 0
    said, sound = inspect_checkpoint.verified(arguments.path)
    return "\n".join(said), 0 if sound else CheckpointError.exit_code


def _divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """What comes before ``--``, and after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _say(line: str) -> None:
    terminal.write_error(f"tf_dist run: {line}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
