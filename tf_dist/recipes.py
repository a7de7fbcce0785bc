"""Configurations shipped with this package, for ``--config NAME``.

In a checkout they are links to ``data/*.yaml``; an installed package has the files themselves.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).with_name("data")
NAMES = ("nanogpt",)


def config_file(path: str) -> str:
    """The file that ``--config`` means: what lies there, or that of a name of ours where nothing does."""
    if path in NAMES and not os.path.lexists(path):
        return str(FOLDER / f"{path}.yaml")
    return path
