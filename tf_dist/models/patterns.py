"""Choose weights of a model by patterns of their paths, as ``--freeze`` and other options do.

A pattern is one of shells (`fnmatch`), and matches a weight by its path (``layer_0_attention/
query_key_value/kernel``), by the name of a layer in it (``query_key_value``), or by the path of such a layer
(``layer_0_*``). Several are separated by commas; one that begins with ``!`` takes back what those before it
have chosen, as in ``*,!head*``.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from tf_dist.errors import UsageError
from tf_dist.spelling import did_you_mean

# Paths in an error message.
MOST_SHOWN = 8


def chosen(paths: Sequence[str], patterns: str, option: str) -> list[int]:
    """The weights that some patterns choose, by index, ascending.

    Args:
        paths: of all weights.
        patterns: see above.
        option: that the patterns come from, for error messages.

    Raises:
        UsageError: a pattern matches no weight.
    """
    found: set[int] = set()
    for word in filter(None, (word.strip() for word in patterns.split(","))):
        hits = matching(paths, word.removeprefix("!"))
        if not hits:
            raise UsageError(f"{option} {word!r} matches no weight of this model{_known(paths, word)}")
        found = found - hits if word.startswith("!") else found | hits
    return sorted(found)


def matching(paths: Sequence[str], pattern: str) -> set[int]:
    """The indices of paths that one pattern matches."""
    return {i for i, path in enumerate(paths) if any(fnmatchcase(name, pattern) for name in names_in(path))}


def names_in(path: str) -> list[str]:
    """The path of a weight, those of the layers that it is in, and their names."""
    words = path.split("/")
    return [*accumulate(words, lambda before, word: f"{before}/{word}"), *words]


def _known(paths: Sequence[str], word: str) -> str:
    layers = list(dict.fromkeys(path.split("/")[0] for path in paths))
    shown = ", ".join(layers[:MOST_SHOWN]) + (", ..." if len(layers) > MOST_SHOWN else "")
    return f". Its layers are {shown}{did_you_mean(word, layers)}"
