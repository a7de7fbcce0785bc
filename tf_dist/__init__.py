"""Train Keras language models on every core you can reach with ``mpirun``.

comm = tf_dist.connect()                    # before keras is imported
trainer = tf_dist.Trainer(model, keras.optimizers.Adam(1e-3), comm)
trainer.fit(tokens, steps=1000)
"""

from __future__ import annotations

from tf_dist import import_path as import_path  # before all others

# isort: split
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from tf_dist.comm.runtime.communicators import as_comm as as_comm
from tf_dist.comm.runtime.launch import connect as connect
from tf_dist.comm.runtime.log_handlers import install as _install
from tf_dist.comm.transport.base import Comm as Comm
from tf_dist.keras_fit.first_fit import watch_fit
from tf_dist.parallel.mesh import Mesh as Mesh
from tf_dist.renamed_modules import install as _install_renamed
from tf_dist.version import __version__ as __version__

if TYPE_CHECKING:
    from tf_dist import callbacks as callbacks
    from tf_dist import strategies as strategies
    from tf_dist.keras_fit.api import distribute as distribute
    from tf_dist.keras_fit.api import independent as independent
    from tf_dist.keras_fit.api import shard as shard
    from tf_dist.parallel import aggregators as aggregators
    from tf_dist.training.trainer import Trainer as Trainer

__all__ = [
    "Comm", "Mesh", "Trainer", "__version__", "aggregators", "as_comm", "callbacks", "connect", "distribute",
    "independent", "shard", "strategies",
]  # fmt: skip
_MODULES = {"aggregators": "parallel.aggregators", "callbacks": "callbacks", "strategies": "strategies"}
_HOME = {
    "Trainer": "training.trainer",
    "distribute": "keras_fit.api",
    "independent": "keras_fit.api",
    "shard": "keras_fit.api",
}
_install()
_install_renamed()
# A script that connects and never says `distribute` or `shard` must not train N models without a word.
register_post_import_hook(watch_fit, "keras")


def __getattr__(name: str) -> Any:
    """Import what needs TensorFlow when it is first asked for: `connect` must come before."""
    if name in _MODULES:
        return import_module(f"tf_dist.{_MODULES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'tf_dist' has no attribute {name!r}")
    return getattr(import_module(f"tf_dist.{_HOME[name]}"), name)
