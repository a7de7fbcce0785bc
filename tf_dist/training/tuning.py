"""XLA autotuning before the first step: whether XLA makes forward and backward faster.

XLA fuses the operations between matrix products, which helps models of Keras's own layers, and our own less.
It also rounds differently, and its random generator gives different dropout masks. A timed choice could fall
one way on two ranks and the other way on four, and then the number of ranks would change the result: it is
made only on request, and checkpoints keep it.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.comm.base import Comm
from tf_dist.errors import UsageError

AUTOTUNE = ("exact", "full", "off")
XLA = ("auto", "on", "off")
# Gradients of each kind that are timed, after one that is not.
TIMED = 5
# XLA must save this share of the time: less is noise, and its bits are not those of other runs.
WORTH_IT = 0.03
UNTRIED = "which was not timed: --autotune full compares both, but changes rounding"


def talks_inside(model: keras.Model) -> str:
    """Why XLA cannot compile a model whose layers talk to other ranks (`tf_dist.layers`); else nothing."""
    for layer in model._flatten_layers():
        if getattr(layer, "tf_dist_talks", False):
            return f"layer {layer.name!r} talks to other ranks inside a step, and XLA has no way out to them"
    return ""


class Tuning:
    """How forward and backward are compiled.

    Args:
        replica: a `tf_dist.training.replica.Replica`, which computes gradients; where XLA cannot, any other.
        comm: all ranks.
        autotune: "full" to time both ways.
        xla: "on" or "off" whatever it costs; "auto": what autotune finds, else off.
        cannot: why XLA cannot compile a rank's work, whatever the model; empty where it can.

    Attributes:
        said: a line for people.

    Raises:
        UsageError: there is no such choice, or XLA was asked for where it cannot be.
    """

    def __init__(self, replica: Any, comm: Comm, autotune: str, xla: str, cannot: str = "") -> None:
        for name, word, known in (("autotune", autotune, AUTOTUNE), ("xla", xla, XLA)):
            if word not in known:
                raise UsageError(f"unknown {name} {word!r}: choose one of {', '.join(known)}")
        if cannot and xla == "on":
            raise UsageError(f"--xla on: {cannot}. Use --xla off")
        self._replica, self._comm, self._cannot = replica, comm, cannot
        self._wanted, self._measure, self._why = xla, autotune == "full", "as was asked for"
        self.said = ""

    def go_on_with(self, xla: bool) -> None:
        """Do as a run did that is gone on with, unless something else was asked for."""
        if self._wanted == "auto":
            self._wanted, self._why = "on" if xla else "off", "as before"

    def choose(self) -> None:
        """Find out, the first time; a collective.

        Raises:
            UsageError: XLA was asked for and cannot compile the model.
        """
        if self.said:
            return
        if self._cannot:
            self.said = f"without XLA: {self._cannot}"
        elif self._wanted == "auto" and self._measure:
            self._compare()
        elif self._wanted == "on":
            self._replica.use_xla(True)
            self._insist()
            self.said = f"by XLA, {self._why}"
        else:
            self._replica.use_xla(False)
            self.said = f"without XLA, {self._why if self._wanted == 'off' else UNTRIED}"

    def _insist(self) -> None:
        reason = self._first_reason(self._try())
        if reason:
            raise UsageError(f"--xla on: XLA cannot compile this model ({reason}). Use --xla off")

    def _compare(self) -> None:
        """Time both ways in turn; the slowest rank counts, for all wait for it."""
        replica, comm = self._replica, self._comm
        taken_s: dict[bool, list[float]] = {False: [], True: []}
        replica.use_xla(True)
        reason = self._first_reason(self._try())
        for xla in (False, True) * (0 if reason else 1 + TIMED):
            replica.use_xla(xla)
            comm.barrier()
            begun = time.perf_counter()
            self._one_gradient()
            taken_s[xla].append(time.perf_counter() - begun)
        if reason:
            replica.use_xla(False)
            self.said = f"without XLA, which cannot compile this model ({reason})"
            return
        medians = [statistics.median(taken_s[xla][1:]) for xla in (False, True)]
        without_s, with_s = np.max(comm.allgather_obj(medians), axis=0).tolist()
        replica.use_xla(with_s < (1 - WORTH_IT) * without_s)
        self.said = (
            f"{'by' if replica.xla else 'without'} XLA: {1e3 * with_s:.1f} ms a micro-batch with it, "
            f"{1e3 * without_s:.1f} ms without"
        )

    def _first_reason(self, mine: str) -> str:
        """Why it does not work on some rank, the same words on all; empty where it works everywhere."""
        return str(max(self._comm.allgather_obj(mine)))

    def _try(self) -> str:
        """Compile, and compute a gradient; why it does not work, or nothing."""
        try:
            self._one_gradient()
        except (tf.errors.OpError, ValueError) as error:
            return str(error).strip().splitlines()[0][:200]
        return ""

    def _one_gradient(self) -> None:
        ids_BxT = np.zeros((self._replica.rows, self._replica.seq_len), np.int32)
        self._replica.gradients(ids_BxT, ids_BxT, (0, 0))
