"""Text sources -> a stream of documents that can be read again from the start.

A text file is one document; a row of a table is one document. A long document is handed out in
*pieces*, so that a corpus far larger than the memory can be tokenized.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tf_dist.data.decoding import Counts, decoded, opened
from tf_dist.data.sources import SourceFile, cap, find_files
from tf_dist.data.tables import rows
from tf_dist.errors import DataError, UsageError

# Small enough that several are tokenized at once, one per core.
PIECE_CHARACTERS = 1 << 16
CUT_CHARACTERS = 1 << 13


class Piece(NamedTuple):
    """A part of a document, never empty; ``last`` is True for its end. ``where``: its file, or row of one."""

    text: str
    last: bool
    where: str


class Corpus:
    """Documents behind ``--data`` values.

    Args:
        sources: ``stdlib``, files, globs, folders; `find_files` has the rules.
        text_column: which column of a table holds the text.
        errors: ``strict`` or ``replace``, for bytes that are not UTF-8.
        max_bytes: at most this much of the standard library; 0 is all of it. Files are unaffected.

    Raises:
        DataError: a source is missing, unreadable or of an unknown kind.
        UsageError: ``errors`` or ``max_bytes`` cannot be right.
    """

    def __init__(
        self,
        sources: Sequence[str],
        *,
        text_column: str = "text",
        errors: str = "strict",
        max_bytes: int = 0,
    ) -> None:
        if errors not in ("strict", "replace"):
            raise UsageError(f"errors is {errors!r}: it must be strict or replace.")
        if max_bytes < 0:
            raise UsageError(f"max_bytes is {max_bytes}: it must be 0 (no limit) or more.")
        self.sources = tuple(sources)
        self.text_column = text_column
        self.errors = errors
        # How many files in folders and globs say by no suffix that they are text.
        self.passed_over: Counter[str] = Counter()
        self.files = cap(find_files(sources, self.passed_over), max_bytes)

    def __iter__(self) -> Iterator[str]:
        """The documents, whole."""
        parts: list[str] = []
        for piece in self.pieces(Counts()):
            parts.append(piece.text)
            if piece.last:
                yield "".join(parts)
                parts = []

    def pieces(self, counts: Counts) -> Iterator[Piece]:
        """The documents in pieces of about `PIECE_CHARACTERS`; empty documents are left out.

        Args:
            counts: fresh; filled as the pass goes on.

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

    def _file_pieces(self, file: SourceFile, counts: Counts, seen: set[bytes]) -> Iterator[Piece]:
        if file.stdlib:
            yield from _stdlib_pieces(file, counts, seen)
        elif file.kind in (".txt", ".md", ".py"):
            with opened(file.path, file.size_bytes) as stream:
                texts = decoded(stream, str(file.path), self.errors, counts)
                yield from _document(texts, counts, str(file.path))
        else:
            for where, text in rows(file.path, file.kind, self.text_column, self.errors, counts):
                yield from _document(iter([text]), counts, where)


def _stdlib_pieces(file: SourceFile, counts: Counts, seen: set[bytes]) -> Iterator[Piece]:
    with opened(file.path, file.size_bytes) as stream:
        data = stream.read(file.size_bytes)
    digest = hashlib.sha256(data).digest()
    if data and digest in seen:
        counts.duplicates += 1
        return
    seen.add(digest)
    try:
        # Its tests hold files in other encodings and files that are broken on purpose.
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        counts.not_utf8 += 1
        return
    yield from _document(iter([text]), counts, str(file.path))


def _document(texts: Iterator[str], counts: Counts, where: str) -> Iterator[Piece]:
    """One document, given in strings of any length, as pieces."""
    held = ""
    for text in texts:
        held += text
        while len(held) >= 2 * PIECE_CHARACTERS:
            at = cut(held[: PIECE_CHARACTERS + 1])
            yield Piece(held[:at], False, where)
            held = held[at:]
    if held:
        yield Piece(held, True, where)
    else:
        counts.empty += 1


def cut(text: str) -> int:
    """Where to cut a long text so that its tokens stay the same: 0 < place < len(text).

    Byte-level BPE looks at words and at runs of whitespace one by one (Radford et al. 2019). So a line
    feed or a space that stands alone between two visible characters may be cut after, or before, with
    no change to any token. A text without such a place near its end, which is no text we know, is cut there.
    """
    lowest = max(1, len(text) - CUT_CHARACTERS)
    for sign, after in (("\n", 1), (" ", 0)):
        at = text.rfind(sign, lowest, len(text) - 1)
        while at > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + after
            at = text.rfind(sign, lowest, at)
    return len(text) - 1
