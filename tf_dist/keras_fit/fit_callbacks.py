"""Keras's CallbackList in `fit`, `evaluate` and `predict` over ranks: logs are global.

`tf_dist.keras_callbacks.callback_list` says who runs where. Here the logs of an epoch, and of an evaluation
whose rows are shared out, become those of all ranks before callbacks see them.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from tf_dist.errors import LaunchError
from tf_dist.keras_callbacks.callback_list import Logs, RankCallbackList
from tf_dist.keras_callbacks.callbacks import AverageMetrics
from tf_dist.keras_fit.fit_session import is_independent, session_of
from tf_dist.keras_fit.optimizers_of import comm_of


class FitCallbackList(RankCallbackList):
    """What Keras's own ``fit``, ``evaluate`` and ``predict`` use after `install`: logs of all ranks.

    Arguments are those of Keras's list; the Comm is that of the model's optimizer.
    """

    def __init__(self, *arguments: Any, **words: Any) -> None:
        model = _model_of(*arguments, **words)
        session = session_of(model)
        assert model is not None and session is not None
        comm, self._session = session.comm, session
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
        if self.model.stop_training and not self._stop_agreed and self.comm.size > 1:
            self.model.stop_training, self._held_back = False, True

    def on_test_begin(self, logs: Logs = None) -> None:
        """Take the metrics of training before Keras resets them."""
        if self._session.evaluation_is_shared and self.comm.size > 1:
            self._averages.on_test_begin(logs)
        super().on_test_begin(logs)

    def on_test_end(self, logs: Logs = None) -> None:
        """Make the results those of all ranks, in the caller's dictionary, which ``evaluate`` returns."""
        if self._session.evaluation_is_shared and self.comm.size > 1:
            self._session.reduction.end()  # before any other collective
            _flatten(logs)
            self._averages.on_test_end(logs)
        super().on_test_end(logs)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Make the logs those of all ranks, in the caller's dictionary.

        Raises:
            LaunchError: other ranks are still inside the epoch: they have more steps.
        """
        self._session.reduction.end()  # before any other collective, which would meet their next gradient
        if self.comm.size == 1:  # the numbers are Keras's, to the last bit
            return super().on_epoch_end(epoch, logs)
        _flatten(logs)
        self._averages.on_epoch_end(epoch, logs)
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs: Logs = None) -> None:
        """As above."""
        self._averages.on_train_end(logs)
        super().on_train_end(logs)

    def _share_state(self) -> None:
        """Take over the first epoch, where `BackupAndRestore` has restored one; `begin` shares the rest."""
        self.model._initial_epoch = self.comm.broadcast_obj(self.model._initial_epoch)


def _flatten(logs: Logs) -> None:
    """Logs that a ``train_step`` nests (``compile_metrics``), by the names that Keras will give them."""
    for name, value in list((logs or {}).items()):
        if isinstance(value, dict) and logs is not None:
            logs.update(logs.pop(name))


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
    ours = kind is keras.callbacks.CallbackList and _is_over_ranks(_model_of(*arguments, **words))
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


def _is_over_ranks(model: Any) -> bool:
    if model is None or is_independent():
        return False
    session = session_of(model)
    if session is None:
        return False
    return comm_of(model) is not None or session.evaluation_is_shared
