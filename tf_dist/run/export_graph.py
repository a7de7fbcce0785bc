"""A run's model as a graph for other runtimes: a SavedModel folder, or an ONNX file.

Both map token ids (B, T) int32 to logits (B, T, V) float32, without a cache: T is the model's window, and
what is behind a text may be anything, as the model is causal.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.atomic_io import sync_folder, temporary_name, write_whole
from tf_dist.errors import BackendMissing, CheckpointError, UsageError

if TYPE_CHECKING:
    from tf_dist.run.load_run import LoadedRun

SAVED_MODEL, ONNX = ".savedmodel", ".onnx"
KINDS = (SAVED_MODEL, ONNX)
OPSET = 17


def export_graph(run: LoadedRun, target: Path) -> str:
    """Write the graph of a model; returns a message.

    Args:
        run: loaded, without adapters.
        target: a folder that ends in .savedmodel, not there yet; or a file that ends in .onnx.

    Raises:
        UsageError: there is something at the folder's place.
        BackendMissing: the package tf2onnx is missing.
        CheckpointError: it cannot be written.
    """
    if target.name.endswith(ONNX):
        _write_onnx(run, target)
    else:
        _write_saved_model(run, target)
    return f"the graph of step {run.step} is in {target}: tokens (B, {run.config.seq_len}) int32 -> logits"


def _input(run: LoadedRun) -> Any:
    """The specification of the model's input."""
    import tensorflow as tf

    return tf.TensorSpec((None, run.config.seq_len), tf.int32, name="tokens")


def _write_saved_model(run: LoadedRun, target: Path) -> None:
    import keras
    import tensorflow as tf

    if os.path.lexists(target):
        raise UsageError(f"{target} is there: choose another folder")
    made = temporary_name(target)
    archive = keras.export.ExportArchive()
    archive.track(run.model)
    archive.add_endpoint(
        "serve", lambda tokens: run.model(tokens, training=False), input_signature=[_input(run)]
    )
    try:
        # Gradients are for training, and those of loops cannot be saved.
        options = tf.saved_model.SaveOptions(experimental_custom_gradients=False)
        archive.write_out(str(made), options=options, verbose=False)
        os.replace(made, target)
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_onnx(run: LoadedRun, target: Path) -> None:
    try:
        import tf2onnx
    except ImportError as error:
        raise BackendMissing("ONNX files need a package: pip install tf2onnx") from error
    import tensorflow as tf

    spec = _input(run)

    @tf.function(input_signature=[spec], autograph=False)  # type: ignore[untyped-decorator]
    def serve(tokens: Any) -> dict[str, Any]:
        return {"logits": tf.cast(run.model(tokens, training=False), tf.float32)}

    made, _ = tf2onnx.convert.from_function(serve, input_signature=[spec], opset=OPSET)
    write_whole(target, made.SerializeToString(), CheckpointError)
