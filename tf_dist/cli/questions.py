"""Shared by `run`, `checkpoint` and `doctor`, which need neither ranks nor TensorFlow."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from tf_dist import progress, terminal
from tf_dist.errors import UsageError
from tf_dist.flags import Parser


def parsed(parser: Parser, words: Sequence[str], *, known_only: bool = True) -> argparse.Namespace:
    """The flags; words that are unknown are in ``others``, where they are allowed.

    Raises:
        UsageError: a flag is wrong; the line of usage has been printed.
        SystemExit: ``--help`` was asked for, and has been answered.
    """
    try:
        flags, others = parser.parse_known_args(list(words))
        if others and known_only:
            parser.error(f"unknown: {' '.join(others)}")
    except UsageError:
        terminal.write_error(parser.format_usage().rstrip("\n"))
        raise
    flags.others = others
    return flags


def exit_code_of(program: Callable[[], int]) -> int:
    """As `terminal.exit_code_of`; 0 where ``--help`` was answered."""

    def answered() -> int:
        try:
            return program()
        except SystemExit:
            return 0

    return terminal.exit_code_of(answered)


def shown(task: str, answer: Callable[[], tuple[str, int]]) -> int:
    """Show progress while an answer is found, print it, and pass on its exit code."""
    progress.begin()
    with progress.task(task):
        said, code = answer()
    progress.end()
    terminal.write(said)
    return code
