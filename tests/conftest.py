"""Set before anything imports Keras. Plain pytest and ``mpirun -np N python -m pytest`` both read this."""

import gc
import logging
import os
import sys

import pytest
from extended import EVERYTHING
from hypothesis import settings

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# The same examples every time and on every rank: ranks that try different examples would not meet.
settings.register_profile("tf_dist", deadline=None, derandomize=True, database=None)
settings.load_profile("tf_dist")


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked ``extended``: more of what other tests show, for ``TF_DIST_TESTS=all``."""
    if not EVERYTHING:
        extended = {item for item in items if item.get_closest_marker("extended")}
        config.hook.pytest_deselected(items=list(extended))
        items[:] = [item for item in items if item not in extended]


FROZEN = []


def pytest_runtest_teardown():
    """What TensorFlow is made of is not looked through at each collection: 5 % of the time of all tests."""
    if not FROZEN and "tensorflow" in sys.modules:
        FROZEN.append(True)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def messages_on_the_console():
    """Where a test has sent the package's messages (to a run folder) they go until it ends."""
    log = logging.getLogger("tf_dist")
    before = handlers_of_ours(log)
    yield
    if before:  # else this test was the first to import the package
        for one in handlers_of_ours(log):
            log.removeHandler(one)
        for one in before:
            log.addHandler(one)


def handlers_of_ours(log):
    """Not those by which pytest captures."""
    return [one for one in log.handlers if type(one).__module__.startswith("tf_dist.")]


class Told(logging.Handler):
    """Remembers messages, also where the console of this rank is silent."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def clear(self):
        self.messages = []


@pytest.fixture
def told():
    """``told.messages``: what the package, and nothing else, has logged so far in this test on this rank."""
    log, one = logging.getLogger("tf_dist"), Told()
    log.addHandler(one)
    yield one
    log.removeHandler(one)
