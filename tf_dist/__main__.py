"""Jobs that are started again, and questions about what they leave behind; without MPI and TensorFlow.

    python -m tf_dist run -np 4 -- scripts/train.py --run-dir runs/long --steps 100000
    python -m tf_dist checkpoint verify runs/latest     # is everything as it was written?
    python -m tf_dist checkpoint show runs/latest       # what is in the newest sound one?
    python -m tf_dist checkpoint convert runs/latest model.safetensors     # and back, into a new run's folder
    python -m tf_dist doctor                            # what have dead jobs left in memory? (--clean)

`run` starts `mpirun -np N python ...`, and again after a failure, from the newest sound checkpoint; flags
that it does not know go to mpirun. Of the hosts in --host or --hostfile those that do not answer after a
failure are left out, with their ranks. SIGTERM, SIGINT and SIGUSR1 are passed on, and end it. Its exit code
is that of the last job. A path of `checkpoint` is a run folder, its ``checkpoints`` folder, or a checkpoint.
Exit codes of `checkpoint`: 0; 77 one is damaged (verify), or there is none that can be used. Of `doctor`: 0;
70 something could not be looked into, or removed. 64 is for usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tf_dist import doctor, terminal
from tf_dist.errors import CheckpointError, TfDistError, UsageError
from tf_dist.hosts import Launch
from tf_dist.restarts import USUAL, Patience, Restarts, own_mpirun, with_run_dir
from tf_dist.training import convert, inspect_checkpoint
from tf_dist.training.status import correct


def main(argv: list[str]) -> int:
    """Answer one question; the exit code."""
    parser = argparse.ArgumentParser(
        "python -m tf_dist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    topics = parser.add_subparsers(dest="topic", required=True)
    checkpoint = topics.add_parser("checkpoint", help="what a run has saved")
    checkpoint.add_argument("question", choices=("verify", "show", "convert"))
    checkpoint.add_argument("path", type=Path, help="a run folder, its checkpoints folder, or a checkpoint")
    checkpoint.add_argument("target", type=Path, nargs="?", help="convert: where to; a file or a run folder")
    checkpoint.add_argument("--checkpoint", default="latest", help="convert: latest, best, or a path")
    named = "convert: what makes the run's model, as package.module:function, where that is a user's"
    checkpoint.add_argument("--model", default="", help=named)
    run = topics.add_parser("run", help="a job that is started again after failures")
    run.add_argument("-np", type=int, default=2, help="ranks")
    run.add_argument("--min-ranks", type=int, default=1, help="where hosts are gone: no fewer than this")
    run.add_argument("--tries", type=int, default=USUAL.tries, help="starts without a new checkpoint")
    run.add_argument("--mpirun", default=own_mpirun(), help="the launcher")
    health = topics.add_parser("doctor", help="what dead jobs have left on this machine")
    health.add_argument("--clean", action="store_true", help="remove it")
    own, job = _divided(argv)
    try:
        arguments, others = parser.parse_known_args(own)
        if arguments.topic == "run" and not job:
            parser.error("run: give the job after --, as in: run -np 4 -- scripts/train.py --steps 1000")
        if others and arguments.topic != "run":
            parser.error(f"unknown: {' '.join(others)}")
    except SystemExit as error:  # argparse's own code is 2
        return 64 if error.code else 0
    return terminal.exit_code_of(lambda: _answer(arguments, others, job))


def _answer(arguments: argparse.Namespace, others: list[str], job: list[str]) -> int:
    if arguments.topic == "run":
        words, run_dir = with_run_dir(job)
        launch = Launch(words, arguments.np, arguments.min_ranks, arguments.mpirun, others, _say)
        code = Restarts(launch.command, run_dir, Patience(max(1, arguments.tries)), _say).run()
        correct(run_dir)
        return code
    if arguments.topic == "doctor":
        lines, well = doctor.report(doctor.folders(), arguments.clean)
        terminal.write("\n".join(lines))
        return 0 if well else TfDistError.exit_code
    if arguments.question == "convert":
        if arguments.target is None:
            raise UsageError("convert takes two paths, as in: convert runs/latest model.safetensors")
        terminal.write(
            convert.convert(arguments.path, arguments.target, arguments.checkpoint, arguments.model)
        )
        return 0
    if arguments.question == "show":
        terminal.write(inspect_checkpoint.shown(arguments.path))
        return 0
    said, sound = inspect_checkpoint.verified(arguments.path)
    terminal.write("\n".join(said))
    return 0 if sound else CheckpointError.exit_code


def _divided(argv: list[str]) -> tuple[list[str], list[str]]:
    """What comes before ``--``, and after it."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def _say(line: str) -> None:
    terminal.write_error(f"tf_dist run: {line}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
