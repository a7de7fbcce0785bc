"""``tf-dist checkpoint export``: a run as a model folder of Hugging Face, or as a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tf_dist.errors import UsageError
from tf_dist.huggingface.config_json import config_json
from tf_dist.huggingface.export import export
from tf_dist.run.export_graph import KINDS as GRAPHS
from tf_dist.run.export_graph import export_graph


def export_run(run_dir: Path, folder: Path, which: str = "latest", model: str = "", task: str = "") -> str:
    """Write the model of a run as a folder that `transformers` opens, or a graph; returns a message.

    Args:
        run_dir: of the run.
        folder: not there yet, or empty; or a name that ends in .savedmodel or .onnx.
        which: checkpoint: ``latest``, ``best`` or a path.
        model: ``package.module:function`` that builds the model of the run, if it is a user's.
        task: ``package.module:Task`` of the run, if it is a user's.

    Raises:
        UsageError: no family of Hugging Face has this model.
        CheckpointError: the run cannot be loaded, or a file cannot be written.
    """
    from tf_dist.run.load_run import load_run, without_adapters

    run = without_adapters(load_run(str(run_dir), which, model, task))
    if folder.name.endswith(GRAPHS):
        return export_graph(run, folder)
    weights = {variable.path: variable for variable in run.model.weights}
    if len(weights) < len(run.model.weights):
        raise UsageError("two weights of this model have one path: give its layers different names")

    def read(path: str) -> np.ndarray:
        return np.asarray(weights[path].value, np.float32)

    count = export(run.config, run.tokenizer, read, folder)
    kind = config_json(run.config, run.tokenizer.end_of_text)[1]["model_type"]
    return f"{count} tensors of step {run.step} are in {folder}, as a model of type {kind}"
