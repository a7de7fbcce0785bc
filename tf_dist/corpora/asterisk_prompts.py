"""Prompts of a telephone exchange, spoken by one voice, 8 kHz (Asterisk's core sounds, CC BY-SA 3.0)."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from tf_dist.corpora.table_rows import MediaFile, Row, data_of, only_file
from tf_dist.errors import DataError


def rows(folder: Path) -> Iterator[Row]:
    """``audio`` (a WAV file) and ``text`` of every prompt in words; tones and silence are left out."""
    path = only_file(folder, "**/core-sounds-*.txt.gz")
    try:
        transcript = gzip.decompress(data_of(path)).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path.name} of the package is damaged: {error}.") from error
    voice = only_file(folder, "**/sounds/*/")
    seen = set()
    for line in transcript.split("\n"):
        name, colon, text = line.partition(":")
        text = " ".join(text.split())
        sound = voice / f"{name.strip()}.wav"
        # "[beep]" describes a sound, and ";" begins a comment.
        if line.startswith(";") or not colon or not text or text[0] in "[<(" or name in seen:
            continue
        if sound.is_file() and sound.resolve().is_relative_to(voice.resolve()):
            seen.add(name)
            yield {
                "audio": MediaFile(f"wav/{name.strip().replace('/', '-')}.wav", data_of(sound)),
                "text": text,
            }
