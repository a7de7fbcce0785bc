"""The oracle of fuzz-fit and of the examples must see what is wrong: scripts that are, one by one."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))

from jobs import Runs
from verdict import CRASHED, DIFFERENT, EQUAL, INVALID, LATE, REFUSED, compared, difference

# Of the oracle itself, which changes seldom.
pytestmark = pytest.mark.extended

BEGIN = "import tf_dist\ncomm = tf_dist.connect()\nplain = tf_dist.__version__ == 'plain'\n"
IMPORT = "from tf_dist.errors import UsageError"
FIT = """
import keras, numpy as np
from tf_dist.errors import UsageError
keras.utils.set_random_seed(1)
x = np.ones((4, 2), "float32")
model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
model.compile(keras.optimizers.SGD(0.1), "mse")
"""
SCRIPTS = {
    "equal": ("results = {'a': [1.0, 2.0]}", EQUAL),
    "different": ("results = {'a': 1.0 if plain else 1.0001}", DIFFERENT),
    "apart": ("results = {'a': float(comm.rank) * 1e-6}", DIFFERENT),
    "named": ("results = {'a' if plain else 'b': 1.0}", DIFFERENT),
    "refused": (f"if not plain:\n    {IMPORT}\n    raise UsageError('no')\nresults = {{}}", REFUSED),
    "blamed": (
        f"if not plain:\n    {IMPORT}, LaunchError\n    raise LaunchError('no')\nresults = {{}}",
        CRASHED,
    ),
    "refused_by_one": (
        f"if not plain:\n    {IMPORT}\n    if comm.rank: raise UsageError('no')\nresults = {{}}",
        DIFFERENT,
    ),
    "late": (
        "if not plain:\n" + "\n".join("    " + line for line in FIT.splitlines()) + "\n"
        "    model.optimizer.build(model.trainable_variables)\n    model.optimizer._iterations.assign(1)\n"
        "    raise UsageError('no')\nresults = {}",
        LATE,
    ),
    "crashed": ("if not plain: raise ValueError('no')\nresults = {}", CRASHED),
    "invalid": ("if plain: raise ValueError('no')\nresults = {}", INVALID),
    "aborted": ("import os\nif not plain and comm.rank: os._exit(3)\nresults = {}", CRASHED),
    "last": ("results = {'a': 1.0}", EQUAL),
}  # fmt: skip


@pytest.fixture(scope="module")
def verdicts(launcher, tmp_path_factory):
    """What is said on two ranks about each script; the launch goes on behind one that ends it."""
    folder = tmp_path_factory.mktemp("oracle")
    scripts = []
    for name, (text, _) in SCRIPTS.items():
        scripts.append(folder / f"{name}.py")
        scripts[-1].write_text(BEGIN + text + "\n")
    runs = Runs(folder, launcher.warm_python())
    runs.plain(scripts)
    runs.ranks(scripts, 2)
    return runs.verdicts(scripts, 2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_verdict(verdicts, name):
    assert verdicts[name].word == SCRIPTS[name][1], verdicts[name]


def test_rule_of_tolerance():
    assert difference([1.0], [1.0 + 9e-6]) < 1e-5 < difference([1.0], [1.0 + 2e-5])
    assert difference([1e3 + 9e-3], [1e3]) < 1e-5 < difference([1e3 + 2e-2], [1e3])
    assert difference([np.nan], [np.nan]) == 0
    assert difference([np.nan], [1.0]) == difference([[1.0]], [1.0]) == np.inf


def test_layers_that_draw_are_compared_between_ranks():
    one = {"a": np.ones(2)}
    assert compared([one, one], {"a": np.zeros(2)}, by_value=False).word == EQUAL
    assert compared([one, {"a": np.zeros(2)}], one, by_value=False).word == DIFFERENT
    assert compared([{"a": np.array([np.nan])}] * 2, one, by_value=False).word == DIFFERENT
