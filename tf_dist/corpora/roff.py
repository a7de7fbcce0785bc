r"""Manual pages -> their options, each with its description: what DocBook and help2man write, no more.

An option is ``.PP``, its names, ``.RS 4``, a description and ``.RE`` (DocBook), or ``.TP``, its names and a
description (help2man).
"""

from __future__ import annotations

import re
from typing import NamedTuple

ESCAPES = {
    "\\-": "-",
    "\\e": "\\",
    "\\(aq": "'",
    "\\(cq": "'",
    "\\(oq": "'",
    "\\(lq": '"',
    "\\(rq": '"',
    "\\(dq": '"',
    "\\*(Aq": "'",
    "\\(bu": "*",
    "\\(co": "(c)",
    "\\(em": "-",
    "\\(en": "-",
    "\\(rs": "\\",
    "\\ ": " ",
    "\\~": " ",
    "\\0": " ",
}
ESCAPE = re.compile(r"\\f\[\w*\]|\\f.|\\s[+-]?\d+|\\[(*]\(?..|\\.", re.DOTALL)
FONTS = {"B", "I", "BR", "RB", "IR", "RI", "BI", "IB"}
PARAGRAPHS = {"PP", "P", "LP", "sp", "br"}


class Option(NamedTuple):
    """What a page says of an option: its names, as ``-n, --dry-run``, and paragraphs."""

    names: str
    paragraphs: tuple[str, ...]


def plain(text: str) -> str:
    """Text without escapes."""
    return ESCAPE.sub(lambda found: ESCAPES.get(found.group(), ""), text)


def options(page: str) -> list[Option]:
    """The options of a page, in order; of nested lists the words stay in the paragraph around them."""
    found: list[Option] = []
    for names, lines in _items(page):
        paragraphs = tuple(" ".join(" ".join(part).split()) for part in _parts(lines))
        paragraphs = tuple(part for part in paragraphs if part)
        if names.startswith("-") and paragraphs:
            found.append(Option(names, paragraphs))
    return found


def _items(page: str) -> list[tuple[str, list[str]]]:
    """Every tagged paragraph: its tag, and the lines that belong to it."""
    lines = page.split("\n")
    items: list[tuple[str, list[str]]] = []
    place = 0
    while place < len(lines):
        if lines[place] == ".TP" or lines[place].startswith(".TP "):
            end = place + 2
            while end < len(lines) and not re.match(r"\.(TP|SH|SS|PP|RE)\b", lines[end]):
                end += 1
            items.append((_tag(lines[place + 1 : place + 2]), lines[place + 2 : end]))
            place = end
        elif lines[place].startswith(".RS"):
            end = _closing(lines, place)
            begin = max((at for at in range(max(place - 6, 0), place) if lines[at] == ".PP"), default=place)
            items.append((_tag(lines[begin + 1 : place]), lines[place + 1 : end]))
            # Options of options are items of their own.
            place += 1
        else:
            place += 1
    return items


def _closing(lines: list[str], place: int) -> int:
    depth = 0
    for at in range(place, len(lines)):
        depth += lines[at].startswith(".RS")
        depth -= lines[at].startswith(".RE")
        if not depth or lines[at].startswith(".SH"):
            return at
    return len(lines)


def _tag(lines: list[str]) -> str:
    return " ".join(" ".join(_words(line) for line in lines).split())


def _parts(lines: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for line in lines:
        macro = re.match(r"[.'](\w+)", line)
        if macro and macro.group(1) in PARAGRAPHS:
            parts.append([])
        else:
            parts[-1].append(_words(line))
    return parts


def _words(line: str) -> str:
    """The words of a line; of a macro none, unless it sets a font."""
    if not line.startswith((".", "'")):
        return plain(line)
    macro, _, rest = line[1:].partition(" ")
    return plain(rest.replace('"', "")) if macro in FONTS else ""
