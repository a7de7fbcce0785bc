"""Who else gets the metrics of a run: TensorBoard, a CSV file, Weights & Biases, MLflow.

Rank 0 writes them, a row of ``metrics.jsonl`` at a time, so that one run is one run there, however many ranks
it has. A resumed run goes on with the same one.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tf_dist.atomic_io import write_whole
from tf_dist.config import Config
from tf_dist.errors import BackendMissing, LaunchError
from tf_dist.run.metrics_file import read_metrics
from tf_dist.untrusted_files import read_json

# Which run of a service a folder is; written by us, read as data.
ID_FILE, ID_BYTES = "reports.json", 1 << 16
PROJECT = "tf_dist"


class MetricsReport(Protocol):
    """One of them."""

    def row(self, row: Mapping[str, Any]) -> None:
        """Take a row of metrics."""

    def close(self) -> None:
        """Write what has not been written."""


def reports_of(config: Config, folder: Path) -> list[MetricsReport]:
    """The reports that a run asks for; on rank 0, where their packages are (`check_installed`)."""
    makers: dict[str, Callable[[Config, Path], MetricsReport]] = {
        "tensorboard": TensorBoard, "csv": CSV, "wandb": Wandb, "mlflow": MLflow,
    }  # fmt: skip
    return [makers[name](config, folder) for name in config.reports]


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """What of a row is a number; without the step."""
    found = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    return {key: float(value) for key, value in found.items()}


def check_installed(config: Config) -> None:
    """Refuse a report whose package is missing, before anything is prepared.

    Raises:
        BackendMissing: with what to install.
    """
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
    for name in config.reports:
        if name in packages and importlib.util.find_spec(name) is None:
            raise BackendMissing(f"--report-to {name} needs a package: pip install {packages[name]}")


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder."""

    def __init__(self, config: Config, folder: Path) -> None:
        import tensorflow as tf

        self._summary = tf.summary
        self._writer = tf.summary.create_file_writer(str(folder / "tensorboard"))

    def row(self, row: Mapping[str, Any]) -> None:
        """As in `MetricsReport`."""
        with self._writer.as_default(step=int(row["step"])):
            for name, value in numbers(row).items():
                self._summary.scalar(name, value)

    def close(self) -> None:
        """As in `MetricsReport`."""
        self._writer.close()


class CSV:
    """``metrics.csv``: a column for each key of ``metrics.jsonl``, written when the run ends or validates."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._folder = folder

    def row(self, row: Mapping[str, Any]) -> None:
        """As in `MetricsReport`."""
        if row.get("val_loss") is not None:
            self.close()

    def close(self) -> None:
        """As in `MetricsReport`."""
        rows = read_metrics(self._folder / "metrics.jsonl")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(self._folder / "metrics.csv", text.getvalue().encode(), LaunchError)


class Wandb:
    """A run of Weights & Biases; ``WANDB_MODE=offline`` keeps it in the run folder."""

    def __init__(self, config: Config, folder: Path) -> None:
        import wandb

        known = _known_ids(folder)
        self._run = wandb.init(
            project=PROJECT, name=folder.name, id=known.get("wandb"), resume="allow", dir=str(folder),
            config=config.as_dict(),
        )  # fmt: skip
        _remember(folder, {**known, "wandb": self._run.id})

    def row(self, row: Mapping[str, Any]) -> None:
        """As in `MetricsReport`."""
        self._run.log(numbers(row), step=int(row["step"]))

    def close(self) -> None:
        """As in `MetricsReport`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, in the store that ``MLFLOW_TRACKING_URI`` names, or ``mlruns`` of the run folder."""

    def __init__(self, config: Config, folder: Path) -> None:
        import mlflow

        store = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").absolute().as_uri()
        self._client = mlflow.MlflowClient(tracking_uri=store)
        known = _known_ids(folder)
        if "mlflow" not in known:
            found = self._client.get_experiment_by_name(PROJECT)
            experiment = found.experiment_id if found else self._client.create_experiment(PROJECT)
            run = self._client.create_run(experiment, run_name=folder.name)
            known["mlflow"] = run.info.run_id
            for name, value in config.as_dict().items():
                self._client.log_param(known["mlflow"], name, str(value)[:500])
            _remember(folder, known)
        self._id = known["mlflow"]

    def row(self, row: Mapping[str, Any]) -> None:
        """As in `MetricsReport`."""
        for name, value in numbers(row).items():
            self._client.log_metric(self._id, name, value, step=int(row["step"]))

    def close(self) -> None:
        """As in `MetricsReport`."""
        self._client.set_terminated(self._id)


def _known_ids(folder: Path) -> dict[str, str]:
    try:
        found = read_json(folder / ID_FILE, ID_BYTES)
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _remember(folder: Path, ids: Mapping[str, str]) -> None:
    write_whole(folder / ID_FILE, (json.dumps(ids) + "\n").encode(), LaunchError)


class Reports:
    """All reports of a run as one; nothing without any.

    Args:
        reports: of `reports_of`.
    """

    def __init__(self, reports: Sequence[MetricsReport]) -> None:
        self._reports = reports

    def row(self, row: Mapping[str, Any]) -> None:
        """Give a row to each."""
        for report in self._reports:
            report.row(row)

    def close(self) -> None:
        """Close each."""
        for report in self._reports:
            report.close()
