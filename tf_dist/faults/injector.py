"""Injection points, as functions that other packages call; see `tf_dist.faults`."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist.errors import UsageError
from tf_dist.faults.spec import VARIABLE, Fault, parse
from tf_dist.faults.writes import Writes


class InjectedFault(Exception):
    """The exception of fault `raise`: an unexpected error."""


class Armed:
    """The armed faults of this rank.

    Args:
        text: as `tf_dist.faults.spec.parse` takes it.
        rank: this one, as numbered when the job begins.

    Attributes:
        faults: of all ranks.
        writes: effects of `diskfull` and `partial` on files.
    """

    def __init__(self, text: str, rank: int) -> None:
        self.faults = parse(text)
        self._mine = [fault for fault in self.faults if fault.hits(rank)]
        self._spent: set[Fault] = set()
        self._step = 0
        self._weights: Sequence[Any] = ()
        self.writes = Writes()

    def begin(self, step: int, weights: Sequence[Any]) -> None:
        """Start a step, counted from 1, with these variables: arrays that can be assigned."""
        self._step, self._weights = step, weights
        self.at("step")

    def at(self, phase: str, step: int = 0) -> None:
        """Inject faults that are due in this phase; of that step, if it is given."""
        self._step = step or self._step
        for fault in self._mine:
            if fault.phase == phase and self._due(fault):
                self._strike(fault)

    def _due(self, fault: Fault) -> bool:
        """Whether a fault is due now: in its steps, or once, at the first opportunity from its step on."""
        if fault.phase != "load" and self._step < fault.step:
            return False
        if fault.kind in ("slow", "nan"):  # also in a repeated step
            return self._step < fault.step + fault.times
        if fault in self._spent:
            return False
        self._spent.add(fault)
        return True

    def _strike(self, fault: Fault) -> None:
        if fault.kind in ("kill", "stop", "segv"):
            sys.stdout.flush()
            os.kill(
                os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(fault.kind, signal.SIGSEGV)
            )
        elif fault.kind == "raise":
            raise InjectedFault(f"{VARIABLE}: {fault}")
        elif fault.kind == "exit":
            sys.exit(fault.code)
        elif fault.kind == "slow":
            time.sleep(1e-3 * fault.ms)
        elif fault.kind == "bitflip":
            flip(self._weights, fault)
        elif fault.kind == "diskfull":
            self.writes.fill()
        elif fault.kind == "partial":
            self.writes.cut(fault.call)

    def inject_nan(self, terms: Sequence[np.ndarray]) -> None:
        """Put NaN into one element of this rank's gradients, of which it has at least one array."""
        for fault in self._mine:
            if fault.kind == "nan" and terms and self._due(fault):
                place = np.random.default_rng([fault.seed, self._step]).integers(terms[0].size)
                terms[0][place] = np.nan


def flip(weights: Sequence[Any], fault: Fault) -> None:
    """Flip bits of one weight, chosen by the seed.

    Raises:
        UsageError: this rank has no weights whose bits could be flipped.
    """
    if not weights:
        raise UsageError(f"{VARIABLE}: this rank holds no weights in which bitflip could flip a bit")
    chance = np.random.default_rng(fault.seed)
    variable = weights[int(chance.integers(len(weights)))]
    array = np.array(np.asarray(variable.value))  # a copy: it is written to
    raw = array.reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)
    one = raw[chance.integers(array.size)]
    for bit in chance.choice(8 * array.itemsize, min(fault.bits, 8 * array.itemsize), replace=False):
        one[bit // 8] ^= np.uint8(1 << bit % 8)
    variable.assign(array)


_armed: Armed | None = None


def arm(text: str, rank: int) -> None:
    """Arm the faults of TF_DIST_FAULT, on every rank.

    Args:
        text: the variable's value; empty for none.
        rank: this one, as numbered when the job begins.

    Raises:
        UsageError: on every rank: an unknown kind, key or phase.
    """
    global _armed
    if _armed is not None:
        _armed.writes.give_back()
    _armed = Armed(text, rank) if text.strip() else None


def said() -> str:
    """Status line: armed faults; empty if there are none."""
    return "; ".join(map(str, _armed.faults)) if _armed is not None else ""


def begin(step: int, weights: Sequence[Any]) -> None:
    """Start a step, counted from 1; `weights` are the variables of this rank."""
    if _armed is not None:
        _armed.begin(step, weights)


def at(phase: str, step: int = 0) -> None:
    """Injection point: this rank has reached a phase of `tf_dist.faults.spec.PHASES`, of `step` if given."""
    if _armed is not None:
        _armed.at(phase, step)


def inject_nan(terms: Sequence[np.ndarray]) -> None:
    """Injection point: this rank's sums of gradients, (P,) float32 each, before communication."""
    if _armed is not None:
        _armed.inject_nan(terms)


def writes_below(folder: Path) -> None:
    """Set the folder below which the run's files are written."""
    if _armed is not None:
        _armed.writes.below(folder)
