"""Questions about what a run leaves behind, answered without MPI and TensorFlow.

    python -m tf_dist checkpoint verify runs/latest     # is everything as it was written?
    python -m tf_dist checkpoint show runs/latest       # what is in the newest sound one?

A path is a run folder, its ``checkpoints`` folder, or one checkpoint.
Exit codes: 0; 64 usage; 77 a checkpoint is damaged (verify), or there is none that can be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tf_dist.errors import CheckpointError, TfDistError
from tf_dist.training import inspect_checkpoint


def main(argv: list[str]) -> int:
    """Answer one question; the exit code."""
    parser = argparse.ArgumentParser(
        "python -m tf_dist", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    topics = parser.add_subparsers(dest="topic", required=True)
    checkpoint = topics.add_parser("checkpoint", help="what a run has saved")
    checkpoint.add_argument("question", choices=("verify", "show"))
    checkpoint.add_argument("path", type=Path, help="a run folder, its checkpoints folder, or a checkpoint")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as error:  # argparse's own code is 2
        return 64 if error.code else 0
    try:
        if arguments.question == "show":
            print(inspect_checkpoint.shown(arguments.path))
            return 0
        said, sound = inspect_checkpoint.verified(arguments.path)
        print("\n".join(said))
        return 0 if sound else CheckpointError.exit_code
    except TfDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
