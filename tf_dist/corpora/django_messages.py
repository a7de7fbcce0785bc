"""Translated messages of Django's user interface, from its gettext catalogues (BSD-3)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tf_dist.corpora.gettext_catalogues import messages
from tf_dist.corpora.table_rows import Row, text_of

LOG = logging.getLogger(__name__)


def rows(folder: Path, language: str) -> Iterator[Row]:
    """Every distinct pair of an English message and its translation.

    Args:
        folder: with the catalogues.
        language: of the catalogues; the name of its column.
    """
    skipped: Counter[str] = Counter()
    seen = set()
    for path in sorted(folder.glob(f"**/locale/{language}/LC_MESSAGES/*.po")):
        for message in messages(text_of(path), path.name, skipped):
            pair = (message.msgid, message.msgstr)
            if pair not in seen and all(text.strip() for text in pair):
                seen.add(pair)
                yield {"en": message.msgid, language: message.msgstr}
    if skipped:
        LOG.info(f"left out: {', '.join(f'{count:,} {reason}' for reason, count in sorted(skipped.items()))}")
