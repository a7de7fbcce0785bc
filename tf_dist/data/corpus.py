"""Text sources -> a stream of documents that can be read repeatedly.

A text file is one document; a row of a table is one document. A long document is yielded in
*chunks*, so that a corpus far larger than the memory can be tokenized.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tf_dist.config.data import DataOptions
from tf_dist.data.decoding import Counts, decoded, opened
from tf_dist.data.sources import SourceFile, cap, find_files
from tf_dist.data.tables import texts
from tf_dist.errors import DataError, UsageError

# Small enough that several are tokenized in parallel, one per core.
CHUNK_CHARACTERS = 1 << 16
CUT_CHARACTERS = 1 << 13


class TextChunk(NamedTuple):
    """A part of a document, never empty; ``last`` is True for its end. ``where``: its file, or row of one."""

    text: str
    last: bool
    where: str


class Corpus:
    """Documents of ``--data`` values.

    Args:
        sources: ``stdlib``, files, globs, folders; `find_files` has the rules.
        text_column: which column of a table holds the text.
        errors: ``strict`` or ``replace``, for invalid UTF-8.
        max_bytes: at most this much of the standard library; 0 is all of it. Files are unaffected.

    Raises:
        DataError: a source is missing, unreadable or of an unknown kind.
        UsageError: ``errors`` or ``max_bytes`` is invalid.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        text_column: str = DataOptions.text_column,
        errors: str = DataOptions.errors,
        max_bytes: int = DataOptions.max_bytes,
    ) -> None:
        if errors not in ("strict", "replace"):
            raise UsageError(f"errors is {errors!r}: it must be strict or replace.")
        if max_bytes < 0:
            raise UsageError(f"max_bytes is {max_bytes}: it must be 0 (no limit) or more.")
        self.sources = tuple(sources)
        self.text_column = text_column
        self.errors = errors
        # Number of skipped files in folders and globs, by unsupported suffix.
        self.passed_over: Counter[str] = Counter()
        self.files = cap(find_files(sources, self.passed_over), max_bytes)

    def __iter__(self) -> Iterator[str]:
        """Complete documents."""
        parts: list[str] = []
        for piece in self.pieces(Counts()):
            parts.append(piece.text)
            if piece.last:
                yield "".join(parts)
                parts = []

    def pieces(self, counts: Counts) -> Iterator[TextChunk]:
        """The documents in chunks of about `CHUNK_CHARACTERS`; empty documents are skipped.

        Args:
            counts: new; filled during the pass.

        Raises:
            DataError: text that cannot be read, a named file without text, or no text at all.
        """
        seen: set[bytes] = set()
        for file in self.files:
            before = counts.documents
            for piece in self._file_pieces(file, counts, seen):
                counts.documents += piece.last
                counts.text_bytes += len(piece.text.encode())
                yield piece
            if file.named and counts.documents == before:
                raise DataError(f"{file.path} has no text in it. Leave it out, or check how it was written.")
        if not counts.documents:
            raise DataError(f"no text in {' '.join(self.sources)}: every file or cell is empty.")

    def _file_pieces(self, file: SourceFile, counts: Counts, seen: set[bytes]) -> Iterator[TextChunk]:
        if file.stdlib:
            yield from _stdlib_pieces(file, counts, seen)
        elif file.kind in (".txt", ".md", ".py"):
            with opened(file.path, file.size_bytes) as stream:
                decoded_texts = decoded(stream, str(file.path), self.errors, counts)
                yield from _document(decoded_texts, counts, str(file.path))
        else:
            for where, text in texts(file.path, file.kind, self.text_column, self.errors, counts):
                yield from _document(iter([text]), counts, where)


def _stdlib_pieces(file: SourceFile, counts: Counts, seen: set[bytes]) -> Iterator[TextChunk]:
    with opened(file.path, file.size_bytes) as stream:
        data = stream.read(file.size_bytes)
    digest = hashlib.sha256(data).digest()
    if data and digest in seen:
        counts.duplicates += 1
        return
    seen.add(digest)
    try:
        # Its tests contain files in other encodings and deliberately broken files.
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        counts.not_utf8 += 1
        return
    yield from _document(iter([text]), counts, str(file.path))


def _document(texts: Iterator[str], counts: Counts, where: str) -> Iterator[TextChunk]:
    """Chunks of one document, from strings of any length."""
    held = ""
    for text in texts:
        held += text
        while len(held) >= 2 * CHUNK_CHARACTERS:
            at = cut(held[: CHUNK_CHARACTERS + 1])
            yield TextChunk(held[:at], False, where)
            held = held[at:]
    if held:
        yield TextChunk(held, True, where)
    else:
        counts.empty += 1


def cut(text: str) -> int:
    """Position at which a long text can be cut without changing its tokens: 0 < position < len(text).

    Byte-level BPE processes words and runs of whitespace separately (Radford et al. 2019). So cutting after,
    or before, a single line feed or space between two visible characters changes no token. A text without
    such a position near its end, which no real text is, is cut there.
    """
    lowest = max(1, len(text) - CUT_CHARACTERS)
    for sign, after in (("\n", 1), (" ", 0)):
        at = text.rfind(sign, lowest, len(text) - 1)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + after
            at = text.rfind(sign, lowest, at)
    return len(text) - 1
