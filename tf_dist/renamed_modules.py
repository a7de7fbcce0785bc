"""Modules that scripts of users name, under the names they had before 0.1; each import of one warns.

The public interface is `tf_dist` itself. What else a script imports may move again.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

RENAMED = {
    "comm.base": "comm.transport.base",
    "comm.horovod": "comm.transport.horovod",
    "comm.launch": "comm.runtime.launch",
    "comm.mpi": "comm.transport.mpi",
    "data.prepared": "data.prepared_dataset",
    "doctor": "ops.doctor",
    "hosts": "ops.hostfile",
    "training.callbacks": "keras_callbacks.callbacks",
    "training.checkpoint": "checkpoint.store",
    "training.generate": "run.generate",
    "training.in_use": "run.run_lock",
    "training.load": "run.load_run",
    "training.manifest": "checkpoint.manifest",
    "training.optimizers": "optim.optimizers",
    "training.run": "run.run_folder",
    "training.schedules": "optim.lr_schedules",
    "training.shards": "checkpoint.shards",
}


class RenamedModules(MetaPathFinder, Loader):
    """Imports the module of today under its earlier name; both are one module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, if it was renamed."""
        package, _, name = fullname.partition(".")
        return spec_from_loader(fullname, self) if package == "tf_dist" and name in RENAMED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module of today."""
        name = "tf_dist." + RENAMED[spec.name.partition(".")[2]]
        warnings.warn(f"{spec.name} is now {name}", FutureWarning, stacklevel=2)
        module = import_module(name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: it was executed under its own name, which it keeps."""
        spec = module.__spec__
        if spec is not None and spec.loader is self:
            module.__spec__ = spec.loader_state


def install() -> None:
    """Let earlier names be imported; any further call changes nothing."""
    if not any(isinstance(finder, RenamedModules) for finder in sys.meta_path):
        sys.meta_path.append(RenamedModules())
