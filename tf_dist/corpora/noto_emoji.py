"""Pictures out of a colour font, and their names: Noto Color Emoji and Unicode's emoji-test.txt."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_dist.corpora.table_rows import MediaFile, Row, data_of, only_file, text_of
from tf_dist.errors import DataError

# "1F600 ; fully-qualified # 😀 E1.0 grinning face"
NAMED = re.compile(r"^([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.+)$", re.MULTILINE)
# Asks for a picture instead of text; the font leaves it out of its sequences.
VARIATION_SELECTOR = 0xFE0F
LIGATURE, EXTENSION = 4, 7


def rows(folder: Path) -> Iterator[Row]:
    """``image`` (a PNG file of 136 x 128) and ``name`` of every emoji of which the font has a picture."""
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError as error:
        raise DataError("pictures out of a font need fonttools: pip install 'tf_dist[tasks]'") from error

    path = only_file(folder, "**/NotoColorEmoji.ttf")
    try:
        font = TTFont(io.BytesIO(data_of(path)), lazy=True)
        glyphs, ligatures, pictures = font.getBestCmap(), _ligatures(font), font["CBDT"].strikeData[0]
    except (TTLibError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path.name} of the package is no font with pictures: {error}.") from error
    for sequence, name in NAMED.findall(text_of(only_file(folder, "**/emoji-test.txt"))):
        codes = [int(code, 16) for code in sequence.split()]
        parts = tuple(glyphs.get(code, "") for code in codes if code != VARIATION_SELECTOR)
        glyph = parts[0] if len(parts) == 1 else ligatures.get(parts, "")
        if glyph in pictures:
            file = f"png/{'-'.join(f'{code:x}' for code in codes)}.png"
            yield {"image": MediaFile(file, bytes(pictures[glyph].imageData)), "name": name}


def _ligatures(font: Any) -> dict[tuple[str, ...], str]:
    """Sequences of glyphs that the font draws as one."""
    found: dict[tuple[str, ...], str] = {}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            if table.LookupType == EXTENSION:
                table = table.ExtSubTable
            if table.LookupType == LIGATURE:
                for first, ligatures in table.ligatures.items():
                    found.update({(first, *one.Component): one.LigGlyph for one in ligatures})
    return found
