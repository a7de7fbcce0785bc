"""Keras callbacks on several ranks: where each runs, and what ranks synchronize after each hook.

* Writers run on rank 0 only: they would overwrite each other's files. All others run on every rank.
* ``model.stop_training`` and the learning rate are synchronized: all stop if any rank requests it, and use
  the learning rate of rank 0.

A synchronization is one small all-reduce after each hook of an epoch; after a hook of a batch only if a
callback could have changed something there. Nothing is sent while predicting.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.keras_callbacks.replica_sync import adjustable, broadcast, broadcast_state

STOCK = "keras.src.callbacks."
# By name: Orbax's is not in every supported version of Keras.
WRITERS = tuple(
    getattr(keras.callbacks, name)
    for name in (
        "BackupAndRestore", "CSVLogger", "ModelCheckpoint", "OrbaxCheckpoint", "ProgbarLogger",
        "RemoteMonitor", "TensorBoard",
    )
    if hasattr(keras.callbacks, name)
)  # fmt: skip
FOREIGN_WRITERS = ("wandb", "mlflow")
# Hooks from these modules do not stop or change a learning rate, or do so on all ranks alike.
QUIET = {kind.__module__ for kind in WRITERS}
QUIET_PACKAGES = (*FOREIGN_WRITERS, "tf_dist")
BEGIN = ("on_train_batch_begin", "on_batch_begin")
END = ("on_train_batch_end", "on_batch_end")

Logs = dict[str, Any] | None


def _at_once(do: Callable[[], Any]) -> Any:
    return do()


def is_writer(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback runs on rank 0 only: by ``rank_zero_only``, or by its class, a known writer."""
    says = getattr(callback, "rank_zero_only", None)
    if says is not None:
        return bool(says)
    if isinstance(callback, WRITERS):
        return True
    return any(kind.__module__.split(".")[0] in FOREIGN_WRITERS for kind in type(callback).__mro__)


class RankCallbackList(keras.callbacks.CallbackList):
    """Keras's callback list, on several ranks. The ranks' lists may differ in writers.

    Args:
        callbacks: Keras callbacks.
        add_history: as in Keras.
        add_progbar: as in Keras; on rank 0.
        model: being trained.
        comm: all ranks.
        lone_optimizer: only rank 0's optimizer steps, and so only it has moving averages of the weights.
        lockstep: whether ranks end their batches together. If not, they synchronize at the end of an epoch:
            until then rank 0's learning rate counts, and stop requests are sent along with gradients.
        together: runs the collective work, see `tf_dist.training.in_place_recovery.InPlaceRecovery`.
        **params: as in Keras.
    """

    def __init__(
        self,
        callbacks: Any = None,
        add_history: bool = False,
        add_progbar: bool = False,
        model: keras.Model | None = None,
        *,
        comm: Comm,
        lone_optimizer: bool = False,
        lockstep: bool = True,
        together: Callable[[Callable[[], Any]], Any] = _at_once,
        **params: Any,
    ) -> None:
        self.comm, self._together = comm, together
        everything = keras.tree.flatten(callbacks) if callbacks else []
        # A callback that only runs on rank 0 may change its state, which must be synchronized here as well.
        self._may_change = [_may_change(everything, hooks) for hooks in (BEGIN, END)]
        if not lockstep:
            self._may_change = [False, False]
        self._may_restore = any(isinstance(one, keras.callbacks.BackupAndRestore) for one in everything)
        swaps = any(isinstance(one, keras.callbacks.SwapEMAWeights) for one in everything)
        self._lends_averages = lone_optimizer and swaps
        self._stop_agreed = self._held_back = False
        kept = [one for one in everything if comm.rank == 0 or not is_writer(one)]
        if comm.rank:
            _silence(kept)
        super().__init__(kept, add_history, add_progbar and comm.rank == 0, model, **params)

    # Hooks ---------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Logs = None) -> None:
        """Decide how often to synchronize; broadcast state that rank 0 may have restored."""

        def anybodys() -> list[bool]:
            flags = np.array([*self._may_change, self._may_restore], np.float64)
            self.comm.allreduce(flags)
            return [bool(flag > 0) for flag in flags]

        self._agree_at_begin, self._agree_at_end, self._may_restore = self._together(anybodys)
        if self._agree_at_end:
            self._async_train = False  # a stop request from Keras's thread could come after synchronization
        self._stop_agreed = self._held_back = False
        super().on_train_begin(logs)
        if self._may_restore:
            self._share_state()
        self._agree()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Call the callbacks, then synchronize."""
        super().on_epoch_begin(epoch, logs)
        self._agree()

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Call the callbacks, then synchronize if one could have changed something."""
        super().on_train_batch_begin(batch, logs)
        if self._agree_at_begin:
            self._agree()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Call the callbacks, then synchronize if one could have changed something."""
        super().on_train_batch_end(batch, logs)
        if self._agree_at_end:
            self._agree()

    def on_test_begin(self, logs: Logs = None) -> None:
        """Call the callbacks; one may swap in the moving averages."""
        self._broadcast_averages()
        super().on_test_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Call the callbacks, then synchronize; one may swap in the moving averages."""
        self._broadcast_averages()
        super().on_epoch_end(epoch, logs)
        self._agree()

    def on_train_end(self, logs: Logs = None) -> None:
        """Call the callbacks; afterwards rank 0's files are complete for every rank."""
        super().on_train_end(logs)
        self._together(self.comm.barrier)

    # Synchronization -------------------------------------------------------------------------------

    def _agree(self) -> None:
        """Stop if any rank requests it, and use the learning rates of rank 0."""
        if self.comm.size == 1:
            self._stop_agreed = self._stop_agreed or self.model.stop_training
            return
        optimizers = adjustable(self.model)

        def known() -> list[float]:
            shared = np.zeros(1 + len(optimizers))
            shared[0] = self._held_back or self.model.stop_training
            if self.comm.rank == 0:
                shared[1:] = [float(optimizer.learning_rate) for optimizer in optimizers]
            self.comm.allreduce(shared)
            return [float(value) for value in shared]

        stop, *rates = self._together(known)
        if stop:
            self.model.stop_training = self._stop_agreed = True
        if self.comm.rank:
            for optimizer, rate in zip(optimizers, rates, strict=True):
                if float(optimizer.learning_rate) != rate:
                    optimizer.learning_rate = rate

    def _broadcast_averages(self) -> None:
        """Broadcast rank 0's moving averages, if no other rank keeps any and `SwapEMAWeights` needs them."""
        if self._lends_averages:
            broadcast(self.model.optimizer.variables, self.comm)

    def _share_state(self) -> None:
        """Broadcast weights, optimizer and first epoch of rank 0, if `BackupAndRestore` has restored them."""
        broadcast_state(self.model, self.comm)
        self.model._initial_epoch = self.comm.broadcast_obj(self.model._initial_epoch)


def _may_change(callbacks: list[Any], hooks: tuple[str, ...]) -> bool:
    return any(not _is_quiet(getattr(callback, hook)) for callback in callbacks for hook in hooks)


def _is_quiet(hook: Any) -> bool:
    """Whether a hook does nothing (Keras marks its own), or is from a module where no rank decides alone."""
    module = getattr(hook, "__module__", None) or ""
    return getattr(hook, "_is_default", False) or module in QUIET or module.split(".")[0] in QUIET_PACKAGES


def _silence(callbacks: list[Any]) -> None:
    """Let Keras's own callbacks print on rank 0 only."""
    for callback in callbacks:
        if type(callback).__module__.startswith(STOCK) and hasattr(callback, "verbose"):
            callback.verbose = 0
