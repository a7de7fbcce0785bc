"""Sentences with human ratings of sentiment (Hutto & Gilbert, *VADER*, ICWSM 2014)."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from tf_dist.corpora.table_rows import Row, data_of
from tf_dist.errors import DataError

DOMAINS = {
    "amazonReviewSnippets": "reviews",
    "movieReviewSnippets": "films",
    "nytEditorialSnippets": "editorials",
    "tweets": "tweets",
}
# Means of 20 ratings from -4 to 4; what is nearer to 0 is neither.
LEAST_RATING = 0.5


def rows(folder: Path) -> Iterator[Row]:
    """``text``, ``label`` (positive or negative), its mean ``rating`` (-4 to 4) and ``domain``.

    Sentences whose rating is between -0.5 and 0.5 are left out.
    """
    for prefix, domain in DOMAINS.items():
        files = sorted(folder.glob(f"**/{prefix}_GroundTruth.txt"))
        if len(files) != 1:
            raise DataError(f"the package has {len(files)} files {prefix}_GroundTruth.txt: expected one.")
        for number, line in enumerate(_decoded(data_of(files[0])).split("\n"), start=1):
            if line.strip():
                text, rating = _parsed(line, f"line {number} of {files[0].name}")
                if text and abs(rating) >= LEAST_RATING:
                    label = "positive" if rating > 0 else "negative"
                    yield {"text": text, "label": label, "rating": rating, "domain": domain}


def _parsed(line: str, where: str) -> tuple[str, float]:
    try:
        _, rating, text = line.split("\t", 2)
        return html.unescape(text).strip(), float(rating)
    except ValueError as error:
        raise DataError(f"{where} of the package is no number, rating and text.") from error


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")
