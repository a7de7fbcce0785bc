"""Keras's own tests of what `fit` touches, with tf_dist in the way; `make keras-suite` runs all."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "keras_suite"))

import suite


def test_as_many_pass_as_without_tf_dist(launcher, tmp_path):
    keras = suite.sources()
    if keras is None:
        pytest.skip("this Keras was installed without its tests")
    bad, lines = suite.run_hopeful([keras / name for name in suite.QUICK], 2, tmp_path)
    assert not bad, "\n".join([*lines, *bad])
