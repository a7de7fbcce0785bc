"""``--predictions``: what a model predicts for each row, beside the row, in a file of JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tf_dist.atomic_io import write_whole
from tf_dist.errors import DataError


def write_predictions(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one JSON object for each row, atomically; on one rank.

    Args:
        path: of the file, replaced if it is there.
        rows: cells by role, with ``prediction`` and ``reference``.

    Raises:
        DataError: it cannot be written.
    """
    text = "".join(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}. Choose another --predictions") from error
