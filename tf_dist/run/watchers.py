"""Who watches a run besides its own files: the user's callbacks, early stopping, and reports elsewhere."""

from __future__ import annotations

from typing import Any

import keras

from tf_dist.comm.runtime.consensus import on_root
from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.run.early_stopping import StopEarly
from tf_dist.run.job import Job
from tf_dist.run.metrics_file import read_metrics
from tf_dist.run.reports import Reports, reports_of
from tf_dist.users_code import imported


def watchers_of(job: Job) -> tuple[list[keras.callbacks.Callback], Reports]:
    """Callbacks of the user and of early stopping, and who else gets the metrics; a collective.

    Raises:
        UsageError: on every rank: the user's function returns no callbacks.
    """
    config, run = job.config, job.run
    found = users_callbacks(config)
    if config.early_stopping:
        before = on_root(job.comm, lambda: read_metrics(run.metrics) if job.trainer.step else [])
        job.early = StopEarly(*config.stops_early_at(), before)
        found.append(job.early)
    return found, Reports(reports_of(config, run.path) if job.comm.rank == 0 else [])


def users_callbacks(config: Config) -> list[Any]:
    """What the function of ``--callbacks`` returns.

    Raises:
        UsageError: it is no list of Keras callbacks.
    """
    if not config.callbacks:
        return []
    found = imported(config.callbacks, "--callbacks")(config)
    known = isinstance(found, list | tuple) and all(isinstance(c, keras.callbacks.Callback) for c in found)
    if not known:
        raise UsageError(f"--callbacks {config.callbacks} returned {found!r}, not a list of Keras callbacks")
    return list(found)
