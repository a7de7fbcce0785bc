"""Descriptions of Debian's packages, from apt's indices: sections, synopses, translations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tf_dist.corpora.table_rows import Row
from tf_dist.untrusted_files import lines

PACKAGES = "Packages"


class Description(NamedTuple):
    """A description: one line, and paragraphs, unwrapped; lists in them keep their lines."""

    synopsis: str
    paragraphs: tuple[str, ...]

    @property
    def long(self) -> str:
        """The paragraphs as one text."""
        return "\n\n".join(self.paragraphs)


def sections(folder: Path) -> Iterator[Row]:
    """``description`` and ``section`` (libs, games, ...) of every distinct description."""
    section_of: dict[str, str] = {}
    for fields in stanzas(folder / PACKAGES):
        section_of.setdefault(fields.get("Description-md5", ""), fields.get("Section", ""))
    seen = set()
    for key, found in descriptions(folder, "en").items():
        text, section = f"{found.synopsis}\n\n{found.long}".strip(), section_of.get(key, "")
        if section and text not in seen:
            seen.add(text)
            yield {"description": text, "section": section.rpartition("/")[2]}


def summaries(folder: Path) -> Iterator[Row]:
    """``description`` (the paragraphs) and ``synopsis`` (the line above them) of every distinct pair."""
    seen = set()
    for found in descriptions(folder, "en").values():
        if found.long and found.synopsis and found not in seen:
            seen.add(found)
            yield {"description": found.long, "synopsis": found.synopsis}


def translations(folder: Path, language: str) -> Iterator[Row]:
    """Pairs of English and another language: synopses, and paragraphs where both have as many.

    Args:
        folder: with the index of both languages.
        language: its code in apt's indices; the name of its column.
    """
    english, seen = descriptions(folder, "en"), set()
    for key, other in descriptions(folder, language).items():
        ours = english.get(key)
        if ours is None:
            continue
        pairs = [(ours.synopsis, other.synopsis)]
        if len(ours.paragraphs) == len(other.paragraphs):
            pairs += zip(ours.paragraphs, other.paragraphs, strict=True)
        for source, target in pairs:
            # What is the same in both was left as it is, or has nothing to be translated.
            if source and target and source != target and (source, target) not in seen:
                seen.add((source, target))
                yield {"en": source, language: target}


def descriptions(folder: Path, language: str) -> dict[str, Description]:
    """Descriptions of an index ``Translation-LANGUAGE`` by the MD5 that apt knows them by."""
    found: dict[str, Description] = {}
    for fields in stanzas(folder / f"Translation-{language}"):
        text = fields.get(f"Description-{language}")
        if text and "Description-md5" in fields:
            found.setdefault(fields["Description-md5"], parsed(text))
    return found


def parsed(text: str) -> Description:
    """A description field: the synopsis; lines that begin with a space, of which `` .`` is an empty one."""
    synopsis, *rest = text.split("\n")
    paragraphs: list[list[str]] = [[]]
    for line in rest:
        if line.strip() in (".", ""):
            paragraphs.append([])
        elif paragraphs[-1] and not line.startswith("  ") and not line.lstrip().startswith(("* ", "- ")):
            paragraphs[-1][-1] += f" {line.strip()}"
        else:  # two spaces: a line of its own
            paragraphs[-1].append(line.strip())
    return Description(synopsis.strip(), tuple("\n".join(lines) for lines in paragraphs if lines))


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """Stanzas of a control file (deb822): field -> value, whose further lines keep their leading space."""
    fields: dict[str, str] = {}
    name = ""
    for raw in lines(path):
        line = raw.decode("utf-8", "replace").rstrip("\n")
        if not line:
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t":
            fields[name] = f"{fields.get(name, '')}\n{line}"
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    if fields:
        yield fields
