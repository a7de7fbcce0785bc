"""Docstrings of the standard library of the Python that runs: what follows their first line -> that line."""

from __future__ import annotations

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tf_dist.corpora.table_rows import Row, data_of

NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def rows(folder: Path) -> Iterator[Row]:
    """``body`` and ``summary`` of every distinct docstring that has both; nothing is downloaded.

    Args:
        folder: of packages, of which there are none.
    """
    seen = set()
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if path.is_file() and NOT_STDLIB.isdisjoint(path.relative_to(root).parts):
            for text in _docstrings(data_of(path, follow=True)):  # a distribution's may be links
                summary, _, body = inspect.cleandoc(text).partition("\n\n")
                pair = (body.strip(), " ".join(summary.split()))
                if all(pair) and pair not in seen and "\n" not in summary:
                    seen.add(pair)
                    yield {"body": pair[0], "summary": pair[1]}


def _docstrings(source: bytes) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in its tests
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # its tests hold files that are broken on purpose
        return
    for node in ast.walk(tree):
        if isinstance(node, Documented):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield text
