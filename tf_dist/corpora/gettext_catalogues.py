"""Messages of gettext catalogues (.po), parsed by polib."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from tf_dist.errors import DataError

ENTRY = re.compile(r"^(?:#~\s*)?msgid\s", re.MULTILINE)


class CatalogueMessage(NamedTuple):
    """One translated message, and the line of its entry, from 1. ``context`` may be empty."""

    line: int
    msgid: str
    msgstr: str
    context: str


def messages(text: str, name: str, skipped: Counter[str]) -> Iterator[CatalogueMessage]:
    """Every translated message of a catalogue; of plural forms the first (singular) and the last (other).

    Args:
        text: the catalogue.
        name: its file, for error messages.
        skipped: counts entries left out: ``untranslated``, ``fuzzy``, ``obsolete``.

    Raises:
        DataError: polib is missing, or this is no catalogue.
    """
    try:
        import polib
    except ImportError as error:
        raise DataError(f"reading {name} needs polib: pip install 'tf_dist[tasks]'") from error
    try:
        # polib takes the name of a file as well; none begins with a line feed and holds the catalogue.
        catalogue = polib.pofile(f"\n{text}")
    except (OSError, UnicodeError, ValueError, IndexError) as error:
        said = " ".join(str(error).split())[:300]
        raise DataError(f"{name} is no gettext catalogue: {said}. Check it with msgfmt -c.") from error
    spelled = len(ENTRY.findall(text))
    if spelled - len(catalogue) not in (0, 1):  # the header is no entry
        raise DataError(
            f"{name} is no sound gettext catalogue: {spelled} entries begin, {len(catalogue)} can be read. "
            "Check it with msgfmt -c."
        )
    for entry in catalogue:
        reason = _left_out(entry)
        if reason:
            skipped[reason] += 1
            continue
        line, context = max(1, entry.linenum - 1), entry.msgctxt or ""
        if not entry.msgid_plural:
            yield CatalogueMessage(line, entry.msgid, entry.msgstr, context)
            continue
        forms = [entry.msgstr_plural[number] for number in sorted(entry.msgstr_plural)]
        if len(forms) > 1:  # languages without plurals have one form, which is that of any number
            yield CatalogueMessage(line, entry.msgid, forms[0], context)
        yield CatalogueMessage(line, entry.msgid_plural, forms[-1], context)


def _left_out(entry: object) -> str:
    """Why an entry is skipped, or an empty string."""
    if getattr(entry, "obsolete", False):
        return "obsolete"
    if getattr(entry, "fuzzy", False):
        return "fuzzy"
    return "" if entry.translated() else "untranslated"  # type: ignore[attr-defined]
