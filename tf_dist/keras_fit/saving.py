"""Atomic saves of one file name by all ranks: each writes a temporary file, and one file takes the name.

The line that ends most scripts, ``model.save(...)``, is run by all ranks at once. They hold the same model,
so it does not matter whose file stays; half a file of one in another's would.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import keras

from tf_dist.comm.runtime.communicators import connected


def install() -> None:
    """Patch Keras, once; any further call changes nothing."""
    for name in ("save", "save_weights"):
        method = getattr(keras.Model, name)
        if not hasattr(method, "__wrapped__") or not getattr(method, "_beside", False):
            setattr(keras.Model, name, _beside(method))


def _beside(save: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(save)
    def saved(self: Any, filepath: Any, *arguments: Any, **words: Any) -> Any:
        comm = connected()
        if comm is None or comm.size == 1 or not isinstance(filepath, str | os.PathLike):
            return save(self, filepath, *arguments, **words)
        path = Path(filepath)
        if not path.parent.is_dir() or path.is_dir() or words.get("overwrite") is False:
            return save(self, filepath, *arguments, **words)
        # The ending stays: Keras chooses the format by it.
        ending = ".weights.h5" if path.name.endswith(".weights.h5") else path.suffix
        temporary = path.with_name(f".{secrets.token_hex(8)}{ending}")
        try:
            result = save(self, str(temporary), *arguments, **words)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return result

    saved._beside = True  # type: ignore[attr-defined]
    return saved
