"""The faults of `mutants.py` can still be planted: code that moves takes them along."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from mutants import MUTANTS, ON_RANKS, ROOT, planted


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_text_is_there_once(mutant):
    path = ROOT / mutant.file
    changed = planted(path.read_text(), mutant)
    compile(changed, path, "exec")
    assert changed != path.read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_its_tests_are_there(mutant):
    assert mutant.tests and mutant.breaks
    for tests in mutant.tests:
        on_ranks = ON_RANKS.fullmatch(tests)
        for word in (on_ranks[2] if on_ranks else tests).split():
            file, _, name = word.partition("::")
            assert f"def {name}" in (ROOT / file).read_text()


def test_there_are_enough_of_them():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40


def test_what_is_not_there_once_is_refused():
    mutant = MUTANTS[0]
    for text in ("", mutant.old * 2):
        with pytest.raises(SystemExit, match=mutant.name):
            planted(text, mutant)
