"""The options of a run that begins with a model folder: those of the folder, unless a flag says otherwise."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from tf_dist.config import FIELDS, Config
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.huggingface.folder import CONFIG, TOKENIZER, open_folder, read_model

LOG = logging.getLogger(__name__)


def options_of_folder(path: Path, config: Config, has_tokenizer: bool) -> dict[str, Any]:
    """Options that the folder's model needs; every header is checked, before memory is taken.

    Args:
        path: of the folder.
        config: as given.
        has_tokenizer: whether the folder has one.

    Raises:
        UsageError: a flag says something else than the folder.
        CheckpointError: the folder has another model, or is damaged.
    """
    model = read_model(path)
    changed: dict[str, Any] = {}
    for name, value in model.options.items():
        given, default = getattr(config, name), FIELDS[name].default
        if given not in (default, value):
            raise UsageError(f"{name} is {given}, and {value} in {path / CONFIG}: leave it out")
        changed[name] = value
    if model.family == "gpt2":
        changed["seq_len"] = _positions(config, model.positions, path)
    if not has_tokenizer and config.tokenizer == FIELDS["tokenizer"].default:
        raise UsageError(f"{path} has no {TOKENIZER}: name the tokenizer of this model with --tokenizer")
    open_folder(path, dataclasses.replace(config, **changed))
    said = ", ".join(f"{name} {value}" for name, value in changed.items() if value != FIELDS[name].default)
    LOG.info(f"model     {path / CONFIG}: {said}")
    return changed


def _positions(config: Config, positions: int, path: Path) -> int:
    """Tokens of a row: all that have a position, or the fewer ones that a flag says."""
    if config.seq_len == FIELDS["seq_len"].default:
        return positions
    if config.seq_len > positions:
        raise UsageError(f"seq_len is {config.seq_len}, and {path / CONFIG} has {positions} positions")
    return config.seq_len


def check_vocabulary(path: Path, tokens: int) -> None:
    """Refuse a tokenizer with more tokens than the folder's embedding has rows.

    Raises:
        CheckpointError: with both numbers.
    """
    rows = read_model(path).vocab_size
    if tokens > rows:
        raise CheckpointError(
            f"the tokenizer has {tokens} tokens, and {path / CONFIG} a vocabulary of {rows}: it is another "
            "model's tokenizer"
        )
