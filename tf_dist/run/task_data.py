"""What a run trains on and is judged by: the rows and metrics of its task, over its prepared data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy.typing as npt

from tf_dist.config import Config
from tf_dist.config.data import PACKED
from tf_dist.data.prepared_dataset import Prepared
from tf_dist.data.rows import Rows
from tf_dist.errors import DataError
from tf_dist.metrics import compute, named_metrics
from tf_dist.models.row_layout import TOKENS
from tf_dist.parallel.mesh import Mesh
from tf_dist.runners.runner import ModelRunner
from tf_dist.tasks.base import Task
from tf_dist.tasks.causal_lm import CausalLM
from tf_dist.tasks.prepare import REFERENCES
from tf_dist.tasks.registry import task_of
from tf_dist.training.predictions import best_classes, greedy, predictions
from tf_dist.untrusted_files import opened

REFERENCES_LIMIT_BYTES = 1 << 30
# Predictions that are printed when a run ends.
SHOWN = 5


class TaskData:
    """The rows of a run.

    Args:
        config: of the run, with the vocabulary of its tokenizer.
        corpus: prepared for it.

    Attributes:
        task: of the run. layout: of its rows. seq_len: words that the model takes of a row.
    """

    def __init__(self, config: Config, corpus: Prepared) -> None:
        self.task: Task = task_of(config)
        self.layout = self.task.layout(corpus.tokenizer.vocab_size)
        self.seq_len = self.layout.words if self.task.of_tables else config.seq_len
        self._config, self._corpus = config, corpus

    def rows(self, side: str) -> Rows:
        """The rows of one side of the split, ``train`` or ``val``."""
        rows = self._corpus.rows(side, self._config.seq_len)
        return self.task.rows(rows, self.layout, self._config.seed)

    def text_bytes(self, side: str) -> int:
        """UTF-8 bytes of the text of one side, of which every token is predicted; 0 where it is not all."""
        of_all = self.task.name == CausalLM.name and self._config.documents != PACKED
        return int(self._corpus.meta["text_bytes"][side]) if of_all else 0

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return list(self._corpus.meta.get("labels", []))

    def references(self) -> list[str]:
        """What predictions for the held-out rows are compared with.

        Raises:
            DataError: the file is damaged.
        """
        path = self._corpus.path / REFERENCES
        with opened(path, follow=True) as file:
            data = file.read(REFERENCES_LIMIT_BYTES)
        lines = data.decode("utf-8", "surrogatepass").splitlines()
        found = [json.loads(line) for line in lines]
        if len(found) != self._corpus.meta["rows"]["val"] or not all(isinstance(one, str) for one in found):
            raise DataError(f"{path} is damaged. Delete its folder and prepare again.")
        return found

    def decode(self, predicted_NxU: npt.NDArray[Any]) -> list[str]:
        """Predictions as texts or labels."""
        return self.task.decode(predicted_NxU, self._corpus.tokenizer, self.labels)

    def predict(self, runner: ModelRunner, mesh: Mesh, rows: int, held_out: Rows, count: int) -> list[str]:
        """Predictions for the first held-out rows, decoded; a collective."""
        how = best_classes
        if self.task.head(len(self.labels)).kind == TOKENS:
            how = partial(greedy, layout=self.layout, end=self._corpus.tokenizer.end_of_text)
        return self.decode(predictions(runner, mesh, rows, held_out, count, how))


class TaskMetrics:
    """The metrics of a task over the first held-out rows, for `tf_dist.training.trainer.Trainer.metrics`.

    Args:
        data: of the run.
        rows: how many; 0: all.

    Attributes:
        predicted: the newest predictions.
        references: what they are compared with.
    """

    def __init__(self, data: TaskData, rows: int) -> None:
        self._data, self._metrics = data, named_metrics(data.task.metrics)
        self.references: Sequence[str] = data.references()
        if rows and data.task.head(len(data.labels)).kind == TOKENS:
            self.references = self.references[:rows]
        self.predicted: Sequence[str] = []

    def shown(self) -> str:
        """Some of the newest predictions beside their references."""
        pairs = zip(self.references[:SHOWN], self.predicted, strict=False)
        lines = [f"  {reference}\n    {prediction}" for reference, prediction in pairs]
        return "\n".join(["predictions  (reference, then prediction)", *lines]) + "\n" if lines else ""

    def __call__(self, runner: ModelRunner, mesh: Mesh, rows: int, held_out: Rows) -> dict[str, float]:
        """Predict and compare; the same on every rank."""
        self.predicted = self._data.predict(runner, mesh, rows, held_out, len(self.references))
        return compute(self._metrics, self.predicted, self.references)
