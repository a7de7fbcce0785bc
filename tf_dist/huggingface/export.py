"""Writes a model folder of Hugging Face: what `transformers` loads, without code of ours."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tf_dist.atomic_io import replaced, write_whole
from tf_dist.checkpoint.safetensors_package import safetensors_package
from tf_dist.config import Config
from tf_dist.data.tokenizer import Tokenizer
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.huggingface.config_json import config_json
from tf_dist.huggingface.families import FAMILIES, Composite
from tf_dist.huggingface.folder import CONFIG, INDEX, TOKENIZER, WEIGHTS
from tf_dist.huggingface.tokenizer_json import tokenizer_json
from tf_dist.untrusted_files import opened

SHARD_BYTES = 2 << 30
Read = Callable[[str], np.ndarray]


def export(
    config: Config, tokenizer: Tokenizer, read: Read, folder: Path, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write a folder; returns the number of tensors.

    ``config.json`` comes last: without it the folder is no model.

    Args:
        config: of the run.
        tokenizer: of the run.
        read: the weights of its model, by path, float32.
        folder: not there yet, or empty.
        shard_bytes: of weights in a file; more go to several files with an index.

    Raises:
        UsageError: no family has this model, or the folder has something in it.
        CheckpointError: a file cannot be written.
    """
    family, description = config_json(config, tokenizer.end_of_text)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise UsageError(f"{folder} is there, and not an empty folder: choose another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {folder}: {error.strerror}") from error
    tensors = theirs(FAMILIES[family].names(config), read)
    count = _write_weights(tensors, folder, shard_bytes)
    end = tokenizer.end_of_text
    _write(folder / TOKENIZER, tokenizer_json(tokenizer))
    _write(folder / "tokenizer_config.json", _json(_tokenizer_config(tokenizer)))
    _write(
        folder / "generation_config.json",
        _json({"bos_token_id": end, "eos_token_id": end, "do_sample": False}),
    )
    _write(folder / CONFIG, _json(description))
    return count


def theirs(names: Iterator[Composite], read: Read) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors, by name, of our weights: parts of the last axis of equal width, or queries' first."""
    for composite in names:
        whole = read(composite.path)
        for part, piece in zip(composite.parts, _pieces(whole, len(composite.parts)), strict=True):
            yield part.name, np.ascontiguousarray(piece.T if part.transposed else piece, np.float32)


def _pieces(whole: np.ndarray, count: int) -> list[np.ndarray]:
    return np.split(whole, count, axis=-1)


def _write_weights(tensors: Iterator[tuple[str, np.ndarray]], folder: Path, shard_bytes: int) -> int:
    """One file, or several and their index; never more than one shard in memory."""
    places: dict[str, int] = {}
    shards = 0
    held: dict[str, np.ndarray] = {}
    total = 0
    for name, array in tensors:
        if held and sum(one.nbytes for one in held.values()) + array.nbytes > shard_bytes:
            shards += 1
            _save(held, folder / f".shard-{shards:05d}")
            held = {}
        held[name] = array
        places[name] = shards + 1
        total += array.nbytes
    if not shards:
        _save(held, folder / WEIGHTS)
        return len(places)
    shards += 1
    _save(held, folder / f".shard-{shards:05d}")
    names = {at: f"model-{at:05d}-of-{shards:05d}.safetensors" for at in range(1, shards + 1)}
    for at, name in names.items():
        os.replace(folder / f".shard-{at:05d}", folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[at] for name, at in places.items()},
    }
    _write(folder / INDEX, _json(index))
    return len(places)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    with replaced(path, CheckpointError) as temporary:
        safetensors_package().save_file(tensors, temporary, {"format": "pt"})
        with opened(temporary, follow=False) as file:
            os.fsync(file.fileno())


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.end_of_text_name
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end,
        "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False,
    }  # fmt: skip


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode(), CheckpointError)
