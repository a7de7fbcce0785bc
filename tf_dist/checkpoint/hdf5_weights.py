"""Validate untrusted HDF5 files of weights: unneeded features of the format are refused.

An HDF5 dataset may refer to another file (external storage, an external link, a virtual dataset): loading it
could read any file of the user, and leak it with the weights. A dataset may also claim to be far larger than
it is. Newer releases of Keras check some of this; here it does not depend on the release.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_dist.errors import CheckpointError
from tf_dist.untrusted_files import opened, shown

KERAS, MEMBER, NAME = ".keras", "model.weights.h5", "foreign.weights.h5"


@contextlib.contextmanager
def checked(path: Path, limit_bytes: int) -> Iterator[Path]:
    """A file from which Keras may load weights: ``path``, or the weights in a ``.keras`` archive, unpacked.

    Args:
        path: a ``.weights.h5`` or ``.keras`` file.
        limit_bytes: of all datasets together.

    Raises:
        CheckpointError: it uses features that no file of weights needs, or is too large.
        OSError, zipfile.BadZipFile, KeyError: it is damaged.
    """
    if not path.name.endswith(KERAS):
        _check(path, limit_bytes)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="tf_dist-") as folder:
        unpacked = Path(folder) / NAME
        with opened(path, follow=True) as archive, zipfile.ZipFile(archive) as zipped:
            if zipped.getinfo(MEMBER).file_size > limit_bytes:
                raise CheckpointError(f"{MEMBER} in {path} is larger than {limit_bytes:,} bytes")
            with zipped.open(MEMBER) as member, open(unpacked, "xb") as file:
                shutil.copyfileobj(member, file)
        _check(unpacked, limit_bytes)
        yield unpacked


def _check(path: Path, limit_bytes: int) -> None:
    import h5py  # type: ignore[import-untyped]

    if os.stat(path).st_size > limit_bytes:
        raise CheckpointError(f"it is larger than {limit_bytes:,} bytes")
    seen, left, total = set[Any](), list[Any](), 0
    with h5py.File(path, "r") as file:
        left.append(file["/"])
        while left:
            group = left.pop()
            for name in group:
                link = group.get(name, getlink=True)
                if not isinstance(link, h5py.HardLink):
                    raise CheckpointError(f"{shown(name)} is a link ({type(link).__name__})")
                item = group[name]
                address = h5py.h5o.get_info(item.id).addr
                if address in seen:
                    continue
                seen.add(address)
                if isinstance(item, h5py.Group):
                    left.append(item)
                elif isinstance(item, h5py.Dataset):
                    total += _bytes_of(item)
                if total > limit_bytes:
                    raise CheckpointError(f"its arrays have more than {limit_bytes:,} bytes")


def replace_layers(target: Path, source: Path) -> tuple[set[str], list[str]]:
    """Replace the arrays of layers in one file of weights by those of another, matched by name.

    Args:
        target: written by Keras a moment ago.
        source: from `checked`.

    Returns:
        The names of these layers, and of those that only ``source`` has.

    Raises:
        ValueError: a layer has other arrays there, or other shapes.
    """
    import h5py

    with h5py.File(target, "r+") as into, h5py.File(source, "r") as file:
        there, own = _layers(file), _layers(into)
        both = there.keys() & own.keys()
        for name in sorted(both):
            new, old = _arrays(there[name]), _arrays(own[name])
            if new.keys() != old.keys():
                raise ValueError(f"layer {name} has the weights {sorted(new)} there, not {sorted(old)}")
            for where, dataset in old.items():
                if new[where].shape != dataset.shape:
                    raise ValueError(
                        f"{name}/{where} is {list(new[where].shape)} there, {list(dataset.shape)} in this "
                        "model. A layer that shall begin anew needs another name"
                    )
                dataset[...] = new[where][...]
        # Layers without weights are in these files as well.
        found = {name for name in both if _arrays(own[name])}
        left = sorted(name for name in there.keys() - own.keys() if _arrays(there[name]))
    return found, left


def _layers(file: Any) -> dict[str, Any]:
    """The layers of a file, by their names in the model."""
    groups = file["layers"].values() if "layers" in file else ()
    named = {str(group["vars"].attrs.get("name", "")): group for group in groups if "vars" in group}
    named.pop("", None)
    if not named:
        raise ValueError("it does not say the names of its layers: it is not of Keras 3")
    return named


def _arrays(group: Any) -> dict[str, Any]:
    """The arrays below a group, by their paths in it."""
    import h5py

    found: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item

    group.visititems(visit)
    return found


def _bytes_of(dataset: Any) -> int:
    """Its size in memory. Raises `CheckpointError` if its data is in another file."""
    if dataset.external or dataset.is_virtual:
        raise CheckpointError(f"{shown(dataset.name)} lies in another file (external storage)")
    return math.prod(dataset.shape or ()) * int(dataset.dtype.itemsize)
