"""Flags of commands that read a run: run folder, checkpoint, and the user code that builds the model."""

from __future__ import annotations

import argparse


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add --run-dir, --checkpoint and --model."""
    parser.add_argument(
        "--run-dir", default="runs/latest", metavar="FOLDER", help="folder of the run [runs/latest]"
    )
    parser.add_argument(
        "--checkpoint",
        default="latest",
        metavar="latest|best|PATH",
        help="latest, best (by validation loss), or a path [latest]",
    )
    parser.add_argument(
        "--model",
        default="",
        metavar="PACKAGE.MODULE:FUNCTION",
        help="function that builds the model, if the run was trained with --model: name it again to run it",
    )
