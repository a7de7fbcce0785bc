"""A fault of one line, and the tests that must catch it: what `mutants.py` plants."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        name: for ``--only`` and the table.
        file: in which it is planted.
        old: text that occurs once there.
        new: what takes its place.
        breaks: what is wrong then.
        tests: that are run, until one catches it: arguments of pytest; N ranks run ``np N: ...``.
        caught_by: the tests that did when the list was last gone through; "" where none has.
    """

    name: str
    file: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]
    caught_by: str = ""
