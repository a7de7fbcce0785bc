"""A pytest plugin for Keras's own tests: ``python -m pytest -p in_the_way ... keras/src/callbacks``.

With ``KERAS_SUITE_RANKS=1`` tf_dist is in the way: the ranks are connected, and every optimizer that is
compiled, or takes a step, is distributed; `fit` then shares out its rows by itself. Without, tests run as
they are, with the same seeds. Outcomes go to the file ``KERAS_SUITE_REPORT`` as lines of JSON.

All ranks run every test, and each phase of a test has one outcome. Tests of callbacks have one temporary
folder on all ranks: rank 0 alone writes, all see what it wrote, nobody removes what another one still reads.
"""

import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from types import ModuleType

import pytest

RANKS = os.environ.get("KERAS_SUITE_RANKS") == "1"
REPORT = os.environ["KERAS_SUITE_REPORT"]
# Ids of tests that have run already, in an earlier launch.
DONE = os.environ.get("KERAS_SUITE_DONE")
FAILED_WAITS_S = 60
# Whether the test that runs is one of callbacks.
share_files = False
exit_status = 0
folders = []

if RANKS:
    import tf_dist

    comm = tf_dist.connect(stall_warn=60, stall_abort=240)
    if comm.size > 1:
        from mpi4py import MPI

        WORLD = MPI.COMM_WORLD.Dup()
RANK, SIZE = (comm.rank, comm.size) if RANKS else (0, 1)

import keras
import numpy as np
from leaving import leave


class _Missing(ModuleType):
    """A package that is not installed, and that files of tests import at the top: who calls it is skipped.

    Nothing is an instance of its classes.
    """

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return type(name, (), {"__init__": lambda *_, **__: self._skip()})
        self._skip()

    def _skip(self):
        pytest.skip(f"{self.__name__} is not installed")


def _stand_in(*names):
    for name in names:
        try:
            import_module(name)
        except ImportError:
            sys.modules[name] = _Missing(name)
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, sys.modules[name])


def _stand_in_for_conftest():
    """What tests import of Keras's own conftest.py, which its wheel does not have."""
    conftest = sys.modules["conftest"] = ModuleType("conftest")
    conftest.skip_if_backend = lambda backend, reason: pytest.mark.skipif(
        keras.backend.backend() == backend, reason=reason
    )


def _draw_alike():
    """Where a test wants random data of no seed, all ranks have the same: they run one script."""
    seed = np.random.seed
    np.random.seed = lambda given=None: seed(1 if given is None else given)


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    _stand_in_for_conftest()
    _draw_alike()
    _stand_in("jax", "jax.numpy", "jax.experimental", "jax.experimental.sparse", "torch", "scipy", "requests")
    if RANK:
        config.pluginmanager.unregister(name="terminalreporter")
    for mark in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{mark}: of Keras")
    if RANKS:
        _distribute_what_is_compiled()
        _distribute_what_steps()


def pytest_sessionfinish(exitstatus):
    global exit_status
    exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    sys.stdout.flush()
    if SIZE > 1:
        WORLD.Barrier()
    for folder in folders if RANK == 0 else ():
        shutil.rmtree(folder, ignore_errors=True)
    leave(exit_status)


def pytest_collection_modifyitems(config, items):
    if DONE:
        done = set(json.loads(open(DONE).read()))
        items[:] = [item for item in items if _name(item) not in done]
    if SIZE > 1:
        for module in {item.module for item in items} | {sys.modules["keras.src.testing.test_case"]}:
            for name, shared in SHARED.items():
                if isinstance(getattr(module, name, None), ModuleType):
                    setattr(module, name, shared)


def _name(item):
    """``callbacks/early_stopping_test.py::EarlyStoppingTest::test_init``, wherever Keras is installed."""
    return str(item.path).rpartition("keras/src/")[2] + "::" + item.nodeid.partition("::")[2]


def _note(**what):
    if RANK == 0:
        with open(REPORT, "a") as file:
            file.write(json.dumps(what) + "\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    global share_files
    share_files = SIZE > 1 and _name(item).startswith("callbacks/")
    _note(test=_name(item), outcome="begun")
    random.seed(1)
    keras.utils.set_random_seed(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if SIZE > 1:
        _of_all_ranks(report)
    text = report.longreprtext
    if report.failed or report.skipped or call.when == "call":
        if report.skipped and isinstance(report.longrepr, tuple):
            text = report.longrepr[2]
        text = text[-3000:]
        _note(test=_name(item), outcome=report.outcome, phase=call.when, text=text, seconds=report.duration)
    return report


def _of_all_ranks(report):
    """Make an outcome that of all ranks; one that fails while others do not come ends the job."""
    request, deadline = WORLD.Ibarrier(), time.monotonic() + FAILED_WAITS_S
    while not request.Test():
        if report.failed and time.monotonic() > deadline:
            os.write(2, f"rank {RANK} failed alone:\n{report.longreprtext}\n".encode())
            WORLD.Abort(1)
        time.sleep(0.001)
    everyone = WORLD.allgather((report.outcome, report.longreprtext))
    failed = [rank for rank, (outcome, _) in enumerate(everyone) if outcome == "failed"]
    if failed:
        report.outcome = "failed"
        report.longrepr = "\n".join(f"rank {rank} of {SIZE}: {everyone[rank][1]}" for rank in failed)


# What is distributed -------------------------------------------------------------------------------


def _is_distributed(optimizer):
    while optimizer is not None:
        if getattr(optimizer, "comm", None) is not None:
            return True
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return False


def _distribute_what_is_compiled():
    from keras.src.trainers.trainer import Trainer

    original = Trainer.compile

    @wraps(original)
    def compiled(self, *arguments, **words):
        original(self, *arguments, **words)
        optimizer = getattr(self, "optimizer", None)
        if isinstance(optimizer, keras.optimizers.Optimizer) and not _is_distributed(optimizer):
            tf_dist.distribute(optimizer, comm)

    Trainer.compile = compiled


def _distribute_what_steps():
    """A loop of one's own takes steps by `apply`; the outermost optimizer is the one that is distributed."""
    inside = threading.local()

    def stepping(original):
        @wraps(original)
        def apply(self, *arguments, **words):
            if getattr(inside, "steps", 0) or _is_distributed(self):
                return original(self, *arguments, **words)
            inside.steps = 1
            try:
                tf_dist.distribute(self, comm)
                return self.apply(*arguments, **words)
            finally:
                inside.steps = 0

        return apply

    base = keras.src.optimizers.base_optimizer.BaseOptimizer
    scaler = keras.optimizers.LossScaleOptimizer
    base.apply, scaler.apply = stepping(base.apply), stepping(scaler.apply)


# What is shared ------------------------------------------------------------------------------------


class _Shared(ModuleType):
    """A module of which some functions are those of all ranks; for the code of tests only."""

    def __init__(self, module, **functions):
        super().__init__(module.__name__)
        self.__dict__.update(vars(module) | functions)


def _by_rank_0(function):
    @wraps(function)
    def once(*arguments, **words):
        if not share_files:
            return function(*arguments, **words)
        WORLD.Barrier()
        try:
            return function(*arguments, **words) if RANK == 0 else None
        finally:
            WORLD.Barrier()

    return once


def _rmtree(path, *arguments, **words):
    """Later: a rank that has failed comes here alone."""
    if share_files:
        folders.append(path)
    else:
        shutil.rmtree(path, *arguments, **words)


def _mkdtemp(*arguments, **words):
    if not share_files:
        return tempfile.mkdtemp(*arguments, **words)
    return WORLD.bcast(tempfile.mkdtemp(*arguments, **words) if RANK == 0 else None)


class _Folder:
    """A `tempfile.TemporaryDirectory` of all ranks, removed when pytest ends."""

    def __init__(self, *_, **__):
        self.name = _mkdtemp()

    def __enter__(self):
        return self.name

    def __exit__(self, *_):
        self.cleanup()

    def cleanup(self):
        _rmtree(self.name)


@contextmanager
def _warned_on_rank_0(*_, **__):
    """Callbacks that write are rank 0's, and so are their warnings."""
    with warnings.catch_warnings(record=True) as caught:
        yield caught


SHARED = {
    "pytest": _Shared(pytest, warns=_warned_on_rank_0 if RANK else pytest.warns),
    "os": _Shared(os, remove=_by_rank_0(os.remove)),
    "shutil": _Shared(shutil, rmtree=_rmtree),
    "tempfile": _Shared(tempfile, mkdtemp=_mkdtemp, TemporaryDirectory=_Folder),
}
np.random.seed(1)
