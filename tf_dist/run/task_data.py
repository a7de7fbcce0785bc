"""What a run trains on and is judged by: the rows and metrics of its task, over its prepared data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tf_dist.config import Config
from tf_dist.config.data import PACKED
from tf_dist.data.class_weights import class_weights
from tf_dist.data.prepared_dataset import Prepared
from tf_dist.data.rows import Rows
from tf_dist.decoding.beam_search import BeamSearch
from tf_dist.decoding.sampling import GREEDY, Sampling
from tf_dist.errors import UsageError
from tf_dist.metrics import compute, named_metrics
from tf_dist.parallel.mesh import Mesh
from tf_dist.run.speech import write_recordings
from tf_dist.run.task_predictor import TaskPredictor
from tf_dist.runners.runner import ModelRunner
from tf_dist.tasks.base import Task, Values
from tf_dist.tasks.causal_lm import CausalLM
from tf_dist.tasks.prepare import held_out
from tf_dist.tasks.registry import task_of
from tf_dist.tasks.speak import Speak
from tf_dist.training.model import words_of_a_row
from tf_dist.training.predictions import predictions
from tf_dist.training.pseudo_perplexity import PseudoPerplexity

# Predictions that are printed when a run ends.
SHOWN = 5
NO_WEIGHTS = "none"
# Texts that are spoken together.
RECORDED_TOGETHER = 8


class TaskData:
    """The rows of a run.

    Args:
        config: of the run, with the vocabulary of its tokenizer.
        corpus: prepared for it.
        decoding: how texts are predicted, token by token.

    Attributes:
        corpus: its data. task: of the run. layout: of its rows. seq_len: words that the model takes of a row.
    """

    def __init__(self, config: Config, corpus: Prepared, decoding: Sampling | BeamSearch = GREEDY) -> None:
        self.task: Task = task_of(config)
        self.layout = self.task.layout(corpus.tokenizer.vocab_size)
        self.seq_len = words_of_a_row(config)
        self._config, self.corpus = config, corpus
        self._predictor = TaskPredictor(self.task, corpus.tokenizer, self.labels, decoding)

    def rows(self, side: str) -> Rows:
        """The rows of one side of the split, ``train`` or ``val``."""
        rows = self.corpus.rows(side, self._config.seq_len)
        return self.task.rows(rows, self.layout, self._config.seed)

    def pseudo_perplexity(self, side: str) -> PseudoPerplexity:
        """The metric of a masked language model over the first ``metric_rows`` windows of a side."""
        windows = self.corpus.rows(side, self._config.seq_len)
        return PseudoPerplexity(windows, self.layout, self._config.metric_rows or len(windows))

    def text_bytes(self, side: str) -> int:
        """UTF-8 bytes of the text of one side, of which every token is predicted; 0 where it is not all."""
        of_all = self.task.name == CausalLM.name and self._config.documents != PACKED
        return int(self.corpus.meta["text_bytes"][side]) if of_all else 0

    @property
    def class_weights(self) -> list[float]:
        """The weight of each class in the loss of training; none if all weigh the same.

        Raises:
            UsageError: the task has no labels.
        """
        if self._config.class_weights == NO_WEIGHTS:
            return []
        if not self.labels:
            raise UsageError(f"--class-weights: --task {self._config.task} has no labels. Leave it out")
        classes_N = self.rows("train").tokens.reshape(-1, self.seq_len + 1)[:, -1]
        counts = np.bincount(classes_N, minlength=len(self.labels))
        return list(class_weights(counts, self._config.class_weights))

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return list(self.corpus.meta.get("labels", []))

    def predict(
        self, runner: ModelRunner, mesh: Mesh, rows: int, held_out: Rows, given: Sequence[Values]
    ) -> list[str]:
        """Predictions for the first held-out rows, whose cells are given, decoded; a collective."""
        found_NxU = predictions(runner, mesh, rows, held_out, len(given), self._predictor.of_rows)
        return self._predictor.texts(found_NxU, given)

    @property
    def decodes(self) -> bool:
        """Whether a prediction is made token by token."""
        return self._predictor.decodes


class TaskMetrics:
    """The metrics of a task over the first held-out rows, for `tf_dist.training.trainer.Trainer.metrics`.

    Args:
        data: of the run.
        rows: how many; 0: all.

    Attributes:
        given: the cells of the rows. references: what predictions are compared with.
        predicted: the newest predictions.
    """

    def __init__(self, data: TaskData, rows: int) -> None:
        self._data, self._metrics = data, named_metrics(data.task.metrics)
        self.given: Sequence[Values] = held_out(data.corpus)
        if rows and data.decodes:
            self.given = self.given[:rows]
        self.references = [data.task.reference_of(values) for values in self.given]
        self.predicted: Sequence[str] = []

    def shown(self) -> str:
        """Some of the newest predictions beside their references."""
        pairs = zip(self.references[:SHOWN], self.predicted, strict=False)
        lines = [f"  {reference}\n    {prediction}" for reference, prediction in pairs]
        return "\n".join(["predictions  (reference, then prediction)", *lines]) + "\n" if lines else ""

    def __call__(self, runner: ModelRunner, mesh: Mesh, rows: int, held_out: Rows) -> dict[str, float]:
        """Predict and compare; the same on every rank."""
        if not self._metrics:
            return {}
        self.predicted = self._data.predict(runner, mesh, rows, held_out, self.given)
        return compute(self._metrics, self.predicted, self.references)

    def rows(self, runner: ModelRunner, held_out: Rows, path: Path) -> list[dict[str, str]]:
        """The cells of each row with its reference and prediction, for a file at ``path``; on one rank.

        Predicted recordings are written beside it.
        """
        predicted, task = self.predicted, self._data.task
        if isinstance(task, Speak):
            x_NxW = held_out.rows(range(len(held_out)))[0]
            folder = path.with_suffix(".wav")
            names = write_recordings(runner, task, self._data.layout, x_NxW, RECORDED_TOGETHER, folder)
            predicted = [f"{folder.name}/{name}" for name in names]
        pairs = zip(self.given, self.references, predicted, strict=True)
        return [{**given, "reference": r, "prediction": p} for given, r, p in pairs]
