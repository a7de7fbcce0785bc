"""Questions about the options of commands, with the passage of the manual page that answers them."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

from tf_dist.corpora.roff import Option, options
from tf_dist.corpora.table_rows import Row, data_of
from tf_dist.errors import DataError

# A passage is as many options of a page, one after another, as fit.
PASSAGE_CHARACTERS = 1000
ANSWER_CHARACTERS = 300
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")


def rows(folder: Path) -> Iterator[Row]:
    """``question``, ``context`` (some options of a page), ``answer`` (a span of it) and its ``start`` there.

    The answer is the first sentence that the page says of the option.
    """
    seen = set()
    for path in sorted(folder.glob("**/man1/*.1.gz")):
        command = path.name.removesuffix(".1.gz")
        for row in _questions(command, options(_page(path))):
            key = (row["question"], row["context"])
            if key not in seen:
                seen.add(key)
                yield row


def _page(path: Path) -> str:
    try:
        return gzip.decompress(data_of(path)).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path.name} of the package is damaged: {error}.") from error


def _questions(command: str, found: list[Option]) -> Iterator[Row]:
    passage: list[Option] = []
    for option in [*found, None]:
        if option is None or sum(map(_size, [*passage, option])) > PASSAGE_CHARACTERS:
            yield from _of_passage(command, passage)
            passage = []
        if option is not None:
            passage.append(option)


def _size(option: Option) -> int:
    return len(_spelled(option)) + 1


def _spelled(option: Option) -> str:
    text = f"{option.names}: {' '.join(option.paragraphs)}"
    if len(text) <= PASSAGE_CHARACTERS:
        return text
    return text[: text.rindex(" ", 0, PASSAGE_CHARACTERS)]


def _of_passage(command: str, passage: list[Option]) -> Iterator[Row]:
    context = "\n".join(map(_spelled, passage))
    place = 0
    for option in passage:
        answer = SENTENCE.split(option.paragraphs[0], maxsplit=1)[0]
        start = place + len(option.names) + 2
        place += _size(option)
        if len(answer) <= ANSWER_CHARACTERS and context[start : start + len(answer)] == answer:
            question = f"What does {option.names.split(', ')[-1]} do in {command}?"
            yield {"question": question, "context": context, "answer": answer, "start": start}
