"""Flags of commands that read a run: its folder, checkpoint and code of a user, and columns of other data."""

from __future__ import annotations

import argparse
from typing import Any

# Columns that a prediction is made from, and those that it is compared with.
INPUT_COLUMNS = ("text_column", "source_column", "context_column", "question_column")
COLUMNS = (*INPUT_COLUMNS, "label_column", "target_column", "answer_column", "start_column")


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


def add_column_flags(parser: argparse.ArgumentParser, names: tuple[str, ...], data: str) -> None:
    """Add the flags of some columns of tables in ``data``, a flag."""
    for name in names:
        parser.add_argument(
            "--" + name.replace("_", "-"), metavar="COLUMN", help=f"of a table in {data} [as in training]"
        )


def named_columns(flags: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """The columns that flags name."""
    return {name: getattr(flags, name) for name in names if getattr(flags, name)}
