"""Variable names that are equal on all ranks."""

from __future__ import annotations

import re
from typing import Any


def unnumbered(path: str) -> str:
    """A path without the numbers that Keras adds to names: how many layers a rank made before may differ."""
    return "/".join(re.sub(r"_\d+$", "", part) for part in path.split("/"))


def name_of(variable: Any) -> str:
    """The path of a Keras variable, or the name of one of TensorFlow's, without Keras's numbers."""
    return unnumbered(str(getattr(variable, "path", None) or variable.name))
