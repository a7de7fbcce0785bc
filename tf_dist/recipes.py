"""Configurations shipped with this package, for ``--config NAME`` and ``--preset NAME``.

A preset lies below the run's own options and a file: it says what a kind of model is made of, or all of a
recipe. In a checkout they are links to ``data``; an installed package has the files themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

from tf_dist.errors import UsageError
from tf_dist.spelling import did_you_mean

FOLDER = Path(__file__).with_name("data")
NAMES = ("nanogpt",)
# Kinds of models, and whole recipes.
PRESETS = {
    "nanogpt-cpu": "nanogpt.yaml",
    **{
        name: f"presets/{name}.yaml"
        for name in ("gpt2", "gpt2-small", "llama", "qwen", "bert", "t5", "shakespeare")
    },
}


def config_file(path: str) -> str:
    """The file that ``--config`` means: what lies there, or that of a name of ours where nothing does."""
    if path in NAMES and not os.path.lexists(path):
        return str(FOLDER / f"{path}.yaml")
    return path


def preset_file(name: str) -> str:
    """The file of a preset; empty for no name.

    Raises:
        UsageError: there is no such preset.
    """
    if not name:
        return ""
    if name not in PRESETS:
        raise UsageError(f"no preset {name!r}: {', '.join(PRESETS)}{did_you_mean(name, list(PRESETS))}")
    return str(FOLDER / PRESETS[name])
