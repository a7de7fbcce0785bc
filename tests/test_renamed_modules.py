"""Scripts that import modules by earlier names go on working, and are told the new ones."""

import sys
from importlib import import_module

import pytest

from tf_dist.renamed_modules import RENAMED


@pytest.mark.parametrize("old", RENAMED)
def test_both_names_are_one_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"tf_dist.{old}", raising=False)
    new = import_module(f"tf_dist.{RENAMED[old]}")
    with pytest.warns(FutureWarning, match=rf"tf_dist\.{old} is now tf_dist\.{RENAMED[old]}"):
        assert import_module(f"tf_dist.{old}") is new
    assert new.__spec__.name == new.__name__ == f"tf_dist.{RENAMED[old]}"


def test_other_modules_are_not_invented():
    with pytest.raises(ModuleNotFoundError, match=r"training\.nothing"):
        import_module("tf_dist.training.nothing")
