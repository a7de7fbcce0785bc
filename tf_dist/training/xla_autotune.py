"""XLA autotuning before the first step: whether XLA makes forward and backward faster.

XLA fuses the operations between matrix products, which helps models of Keras's own layers more than ours.
It also rounds differently, and its random generator gives different dropout masks. A timed decision could
differ between two ranks and four, and then the number of ranks would change the result: it is made only on
request, and stored in checkpoints.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError

AUTOTUNE = ("exact", "full", "off")
XLA = ("auto", "on", "off")
# Timed gradients of each kind, after one for warm-up.
TIMED = 5
# Least share of the time that XLA must save: less is noise, and not worth other bits.
WORTH_IT = 0.03
UNTRIED = "which was not timed: --autotune full compares both, but changes rounding"


def talks_inside(model: keras.Model) -> str:
    """Why XLA cannot compile a model whose layers communicate (`tf_dist.layers`); empty if they do not."""
    for layer in model._flatten_layers():
        if getattr(layer, "tf_dist_talks", False):
            return f"layer {layer.name!r} talks to other ranks inside a step, and XLA has no way out to them"
    return ""


class XlaAutotune:
    """Decides whether XLA compiles forward and backward.

    Args:
        replica: a `tf_dist.runners.replica.Replica`, which computes gradients; any other with ``cannot``.
        comm: all ranks.
        autotune: "full": time both.
        xla: "on", "off", or "auto": the faster one if autotune times both, else off.
        cannot: why XLA cannot compile a rank's work, whatever the model; empty if it can.

    Attributes:
        description: status line.

    Raises:
        UsageError: an unknown choice, or ``xla`` is "on" although XLA cannot.
    """

    def __init__(self, replica: Any, comm: Comm, autotune: str, xla: str, cannot: str = "") -> None:
        for name, word, known in (("autotune", autotune, AUTOTUNE), ("xla", xla, XLA)):
            if word not in known:
                raise UsageError(f"unknown {name} {word!r}: choose one of {', '.join(known)}")
        if cannot and xla == "on":
            raise UsageError(f"--xla on: {cannot}. Use --xla off")
        self._replica, self._comm, self._cannot = replica, comm, cannot
        self._wanted, self._measure, self._why = xla, autotune == "full", "as was asked for"
        self.description = ""

    def restore(self, xla: bool) -> None:
        """Repeat the decision of the run that is resumed, unless the options say otherwise."""
        if self._wanted == "auto":
            self._wanted, self._why = "on" if xla else "off", "as before"

    def choose(self) -> None:
        """Decide, on the first call; a collective.

        Raises:
            UsageError: XLA was asked for and cannot compile the model.
        """
        if self.description:
            return
        if self._cannot:
            self.description = f"without XLA: {self._cannot}"
        elif self._wanted == "auto" and self._measure:
            self._compare()
        elif self._wanted == "on":
            self._replica.use_xla(True)
            self._insist()
            self.description = f"by XLA, {self._why}"
        else:
            self._replica.use_xla(False)
            self.description = f"without XLA, {self._why if self._wanted == 'off' else UNTRIED}"

    def _insist(self) -> None:
        reason = self._first_reason(self._try())
        if reason:
            raise UsageError(f"--xla on: XLA cannot compile this model ({reason}). Use --xla off")

    def _compare(self) -> None:
        """Time both alternately; the slowest rank counts, as all wait for it."""
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
            self.description = f"without XLA, which cannot compile this model ({reason})"
            return
        medians = [statistics.median(taken_s[xla][1:]) for xla in (False, True)]
        without_s, with_s = np.max(comm.allgather_obj(medians), axis=0).tolist()
        replica.use_xla(with_s < (1 - WORTH_IT) * without_s)
        self.description = (
            f"{'by' if replica.xla else 'without'} XLA: {1e3 * with_s:.1f} ms a micro-batch with it, "
            f"{1e3 * without_s:.1f} ms without"
        )

    def _first_reason(self, mine: str) -> str:
        """Why it fails on some rank, the same text on all; empty if it fails on none."""
        return str(max(self._comm.allgather_obj(mine)))

    def _try(self) -> str:
        """Compile, and compute a gradient; returns why that fails, or an empty text."""
        try:
            self._one_gradient()
        except (tf.errors.OpError, ValueError) as error:
            return str(error).strip().splitlines()[0][:200]
        return ""

    def _one_gradient(self) -> None:
        replica = self._replica
        x, y = (np.zeros((replica.rows, n), np.int32) for n in (replica.seq_len, replica.target_len))
        replica.gradients(x, y, (0, 0))
