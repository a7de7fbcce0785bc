"""The package safetensors, an extra: only those who exchange weights need it."""

from __future__ import annotations

import importlib
from types import ModuleType

from tf_dist.errors import BackendMissing


def safetensors_package(module: str = ".numpy") -> ModuleType:
    """The package safetensors, or a module of it.

    Raises:
        BackendMissing: it is not installed.
    """
    try:
        import ml_dtypes  # noqa: F401  # lets NumPy have bfloat16

        return importlib.import_module("safetensors" + module.rstrip("."))
    except ImportError as error:
        raise BackendMissing("files of safetensors need a package: pip install safetensors") from error
