"""Reports about checkpoints: whether they are valid, and their contents."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from tf_dist.checkpoint import store
from tf_dist.checkpoint.manifest import layout
from tf_dist.errors import CheckpointError
from tf_dist.run.status import correct

# Facts that take too much room; `config` is also in the run folder's config.yaml.
LONG_FACTS = ("config", "versions", "bits_depend_on")


def found_at(path: Path) -> list[Path]:
    """The checkpoints at a path, oldest first: itself, or those of a run.

    Raises:
        CheckpointError: there are none.
    """
    correct(path)
    if store.STEP_FOLDER.fullmatch(path.resolve().name):
        found = [path]
    else:
        found = store.listing(path / "checkpoints") or store.listing(path)
    if not found or not found[0].is_dir():
        raise CheckpointError(
            f"there is no checkpoint at {path}. Give a run folder, as a training's --run-dir, its "
            "checkpoints folder, or a folder step-NNNNNNNN in it"
        )
    return found


def verified(path: Path) -> tuple[list[str], bool]:
    """Verify every byte of some checkpoints: a line for each, and whether all are valid.

    Raises:
        CheckpointError: there are none.
    """
    lines, sound = [], True
    for one in found_at(path):
        try:
            manifest = store.verify(one)
            lines.append(f"{one.name}  sound: {_size(manifest['tensors'])}")
        except CheckpointError as error:
            lines.append(f"{one.name}  damaged: {error}")
            sound = False
    return lines, sound


def shown(path: Path) -> str:
    """Describe a checkpoint, or the newest valid one.

    Raises:
        CheckpointError: there is none.
    """
    found = found_at(path)
    if len(found) == 1:
        chosen, manifest = found[0], store.verify(found[0])
    else:
        chosen, manifest = _newest_sound(found)
    tensors, facts = manifest["tensors"], manifest["facts"]
    is_best = store.best(chosen.resolve().parent) == chosen.resolve()
    best = ", the best by validation loss" if is_best else ""
    lines = [f"{chosen}: step {manifest['step']}, {_size(tensors)}{best}"]
    files = [f"{name} {file.size / 1e6:.2f} MB" for name, file in layout(tensors).items()]
    lines.append(f"  format version {manifest['version']}: {', '.join(sorted(files))}")
    lines += [f"  {name}: {json.dumps(facts[name])}" for name in sorted(facts) if name not in LONG_FACTS]
    lines += [
        f"  {name}: {', '.join(f'{key} {json.dumps(value)}' for key, value in sorted(facts[name].items()))}"
        for name in LONG_FACTS
        if isinstance(facts.get(name), dict)
    ]
    width = max((len(entry["name"]) for entry in tensors), default=0)
    lines += [
        f"  {entry['name']:<{width}}  {entry['dtype']:<8} {'x'.join(map(str, entry['shape'])) or 'scalar'}"
        for entry in tensors
    ]
    return "\n".join(lines)


def _newest_sound(found: list[Path]) -> tuple[Path, dict[str, Any]]:
    """Skips damaged ones silently: `verified` reports them."""
    for path in reversed(found):
        with contextlib.suppress(CheckpointError):
            return path, store.verify(path)
    raise store.none_sound(found)


def _size(tensors: list[dict[str, object]]) -> str:
    total = sum(int(str(entry["bytes"])) for entry in tensors)
    return f"{len(tensors)} tensors, {total / 1e6:.2f} MB"
