"""Keras callbacks on many ranks: who runs where, and what the ranks agree on after each hook.

* Writers run on rank 0 alone: they would overwrite each other's files. All others run everywhere.
* ``model.stop_training`` and the learning rate are agreed: all stop where any rank wants to, and take over
  what rank 0 has set.
* In ``model.fit`` the logs of an epoch, and of an evaluation, become those of all ranks before callbacks
  see them.

An agreement is one small allreduce after each hook of an epoch; after a hook of a batch only where some
callback could have changed something there. Nothing is sent while predicting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import LaunchError
from tf_dist.training.callbacks import AverageMetrics
from tf_dist.training.keras_hooks import reduction_of
from tf_dist.training.replicated import adjustable, broadcast, broadcast_state

STOCK = "keras.src.callbacks."
# By name: Orbax's is not in every Keras that we support.
WRITERS = tuple(
    getattr(keras.callbacks, name)
    for name in (
        "BackupAndRestore", "CSVLogger", "ModelCheckpoint", "OrbaxCheckpoint", "ProgbarLogger",
        "RemoteMonitor", "TensorBoard",
    )
    if hasattr(keras.callbacks, name)
)  # fmt: skip
FOREIGN_WRITERS = ("wandb", "mlflow")
# Hooks from these modules neither stop nor change a learning rate by themselves, or do so on all ranks alike.
QUIET = {kind.__module__ for kind in WRITERS}
QUIET_PACKAGES = (*FOREIGN_WRITERS, "tf_dist")
BEGIN = ("on_train_batch_begin", "on_batch_begin")
END = ("on_train_batch_end", "on_batch_end")

Logs = dict[str, Any] | None


def _at_once(do: Callable[[], Any]) -> Any:
    return do()


def is_writer(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback runs on rank 0 alone: ``rank_zero_only`` says so, or its class is known to write."""
    says = getattr(callback, "rank_zero_only", None)
    if says is not None:
        return bool(says)
    if isinstance(callback, WRITERS):
        return True
    return any(kind.__module__.split(".")[0] in FOREIGN_WRITERS for kind in type(callback).__mro__)


class RankCallbackList(keras.callbacks.CallbackList):
    """Keras's list of callbacks, on many ranks. The ranks' lists may differ in writers.

    Args:
        callbacks: Keras callbacks.
        add_history: as in Keras.
        add_progbar: as in Keras; on rank 0.
        model: being trained.
        comm: all ranks.
        lone_optimizer: only rank 0's takes steps, and so only it has moving averages of the weights.
        lockstep: whether ranks end their batches together. Where not, they agree when an epoch ends: until
            then rank 0's learning rate is the one that counts, and a wish to stop travels with gradients.
        together: runs what the ranks do together, see `tf_dist.training.in_place.InPlace`.
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
        # What a callback that is not kept here may do to rank 0 concerns this rank as well.
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
        """Settle how often to agree; share what rank 0 may have restored."""

        def anybodys() -> list[bool]:
            flags = np.array([*self._may_change, self._may_restore], np.float64)
            self.comm.allreduce(flags)
            return [bool(flag > 0) for flag in flags]

        self._agree_at_begin, self._agree_at_end, self._may_restore = self._together(anybodys)
        if self._agree_at_end:
            self._async_train = False  # a wish from Keras's thread could come after the agreement
        self._stop_agreed = self._held_back = False
        super().on_train_begin(logs)
        if self._may_restore:
            self._share_state()
        self._agree()

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Call the callbacks, then agree."""
        super().on_epoch_begin(epoch, logs)
        self._agree()

    def on_train_batch_begin(self, batch: int, logs: Logs = None) -> None:
        """Call the callbacks, then agree if one could have changed something."""
        super().on_train_batch_begin(batch, logs)
        if self._agree_at_begin:
            self._agree()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Call the callbacks, then agree if one could have changed something."""
        super().on_train_batch_end(batch, logs)
        if self._agree_at_end:
            self._agree()

    def on_test_begin(self, logs: Logs = None) -> None:
        """Call the callbacks; one may swap in the moving averages."""
        self._lend_averages()
        super().on_test_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Call the callbacks, then agree; one may swap in the moving averages."""
        self._lend_averages()
        super().on_epoch_end(epoch, logs)
        self._agree()

    def on_train_end(self, logs: Logs = None) -> None:
        """Call the callbacks; afterwards the files of rank 0 are there for every rank."""
        super().on_train_end(logs)
        self._together(self.comm.barrier)

    # What is shared ------------------------------------------------------------------------------

    def _agree(self) -> None:
        """Stop if any rank wants to, and take over the learning rates of rank 0."""
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

    def _lend_averages(self) -> None:
        """Rank 0's moving averages, where no other rank has kept any and `SwapEMAWeights` wants them."""
        if self._lends_averages:
            broadcast(self.model.optimizer.variables, self.comm)

    def _share_state(self) -> None:
        """Weights, optimizer and first epoch of rank 0, where `BackupAndRestore` has restored them."""
        broadcast_state(self.model, self.comm)
        self.model._initial_epoch = self.comm.broadcast_obj(self.model._initial_epoch)


class FitCallbackList(RankCallbackList):
    """What Keras's own ``fit``, ``evaluate`` and ``predict`` use after `install`: logs of all ranks.

    Arguments are those of Keras's list; the Comm is that of the model's optimizer.
    """

    def __init__(self, *arguments: Any, **words: Any) -> None:
        model = _model_of(*arguments, **words)
        comm = comm_of(model)
        assert model is not None and comm is not None
        self._averages = AverageMetrics(comm)
        self._averages.set_model(model)
        super().__init__(*arguments, comm=comm, **words)

    def on_train_begin(self, logs: Logs = None) -> None:
        """Start all ranks from the state of rank 0."""
        self._may_restore = True
        self._averages.on_train_begin(logs)
        super().on_train_begin(logs)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """As above; a new epoch of metrics."""
        self._averages.on_epoch_begin(epoch, logs)
        super().on_epoch_begin(epoch, logs)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Hold back a wish to stop that is not agreed: this rank would leave the others waiting for it."""
        super().on_train_batch_end(batch, logs)
        if self.model.stop_training and not self._stop_agreed:
            self.model.stop_training, self._held_back = False, True

    def on_test_begin(self, logs: Logs = None) -> None:
        """Take the metrics of training before Keras resets them."""
        self._averages.on_test_begin(logs)
        super().on_test_begin(logs)

    def on_test_end(self, logs: Logs = None) -> None:
        """Make the results those of all ranks, in the caller's dictionary, which ``evaluate`` returns."""
        self._averages.on_test_end(logs)
        super().on_test_end(logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Make the logs those of all ranks, in the caller's dictionary.

        Raises:
            LaunchError: other ranks are still inside the epoch: they have more steps.
        """
        reduction = reduction_of(self.model.optimizer)
        if reduction is not None:
            reduction.end()  # before any other collective, which would meet their next gradient
        self._averages.on_epoch_end(epoch, logs)
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs: Logs = None) -> None:
        """As above."""
        self._averages.on_train_end(logs)
        super().on_train_end(logs)


def comm_of(model: keras.Model | None) -> Comm | None:
    """The Comm that a model's optimizer carries, also inside a LossScaleOptimizer, or None."""
    optimizer = getattr(model, "optimizer", None)
    while optimizer is not None:
        comm = getattr(optimizer, "comm", None)
        if isinstance(comm, Comm):
            return comm
        optimizer = getattr(optimizer, "inner_optimizer", None)
    return None


def install() -> None:
    """Let Keras make a `FitCallbackList` for every model whose optimizer carries a ``comm``.

    Other models, subclasses of Keras's list and lists without a model stay as they were. May be called again.

    Raises:
        LaunchError: this Keras does not make its lists as we know it.
    """
    original = keras.callbacks.CallbackList
    if original.__dict__.get("__new__") is None:
        _check_where_keras_looks(original)
        original.__new__ = staticmethod(_new_list)


def _new_list(kind: type, *arguments: Any, **words: Any) -> Any:
    # The class is chosen here and nothing is replaced, so that `isinstance` holds wherever it is asked.
    ours = kind is keras.callbacks.CallbackList and comm_of(_model_of(*arguments, **words)) is not None
    return object.__new__(FitCallbackList if ours else kind)


def _model_of(
    callbacks: Any = None, add_history: bool = False, add_progbar: bool = False, model: Any = None, **_: Any
) -> Any:
    """The model among the arguments of Keras's list."""
    return model


def _check_where_keras_looks(original: type) -> None:
    from keras.src.backend.tensorflow import trainer

    known = list(inspect.signature(original.__init__).parameters)[1:5]  # type: ignore[misc]
    keras_trainer = trainer.TensorFlowTrainer
    calls = [inspect.unwrap(getattr(keras_trainer, name)) for name in ("fit", "evaluate", "predict")]
    if (
        known != list(inspect.signature(_model_of).parameters)[:4]
        or not all("CallbackList" in call.__code__.co_names for call in calls)
        or getattr(getattr(trainer, "callbacks_module", None), "CallbackList", None) is not original
    ):
        raise LaunchError(
            f"Keras {keras.__version__} does not make its list of callbacks where tf_dist looks for it: "
            "callbacks would write from every rank. Install a Keras that tf_dist was tested with: 3.15"
        )


def _may_change(callbacks: list[Any], hooks: tuple[str, ...]) -> bool:
    return any(not _is_quiet(getattr(callback, hook)) for callback in callbacks for hook in hooks)


def _is_quiet(hook: Any) -> bool:
    """Whether a hook does nothing (Keras marks its own), or comes from where no rank decides alone."""
    module = getattr(hook, "__module__", None) or ""
    return getattr(hook, "_is_default", False) or module in QUIET or module.split(".")[0] in QUIET_PACKAGES


def _silence(callbacks: list[Any]) -> None:
    """What Keras's own callbacks have to say is said on rank 0."""
    for callback in callbacks:
        if type(callback).__module__.startswith(STOCK) and hasattr(callback, "verbose"):
            callback.verbose = 0
