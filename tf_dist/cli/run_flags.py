"""Flags of commands that read a run: run folder, checkpoint, and the user code that it names."""

from __future__ import annotations

import argparse


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add --run-dir, --checkpoint, --model and --task."""
    parser.add_argument(
        "--run-dir", default="runs/latest", metavar="FOLDER", help="folder of the run [runs/latest]"
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="latest|best|PATH",
        help="latest, best (by validation loss), or a path [latest]",
    )
    add_code_flags(parser)


def add_code_flags(parser: argparse.ArgumentParser) -> None:
    """Add --model and --task: code of a run, which runs only where it is named again."""
    parser.add_argument(
        "--model",
        default="",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="function that builds the model, if the run was trained with --model: name it again to run it",
    )
    parser.add_argument(
        "--task",
        default="",
        metavar="PACKAGE.MODULE:TASK",
        help="class of the task, if the run was trained with your own: name it again to run it",
    )
