r"""Relations between words in WordNet's glosses (Miller 1995; the format is in wndb(5WN)).

Distant supervision (Mintz et al. 2009): where the gloss of a word names a word that WordNet relates it to,
the relation is the label. A row's text is ``<head> word </head> : gloss with a <tail> word </tail>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tf_dist.corpora.table_rows import Row, only_file, text_of
from tf_dist.errors import DataError

# Pointers of WordNet; rarer ones are left out.
RELATIONS = {
    "@": "hypernym",
    "+": "derivation",
    "@i": "instance_of",
    "#p": "part_of",
    "\\": "pertains_to",
    ";c": "topic",
    "#m": "member_of",
    "&": "similar_to",
    "%m": "has_member",
    "~": "hyponym",
    "%p": "has_part",
}
FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}
# A marker of syntax behind adjectives.
MARKER = re.compile(r"\((a|p|ip)\)$")


class Pointer(NamedTuple):
    """A relation to another synset, by its key; ``source`` and ``target`` are words of the two, 0 for all."""

    symbol: str
    key: tuple[str, str]
    source: int
    target: int


class Synset(NamedTuple):
    """Words of one meaning, what they are related to, and their gloss."""

    words: tuple[str, ...]
    pointers: tuple[Pointer, ...]
    gloss: str


def rows(folder: Path) -> Iterator[Row]:
    """``text`` with marked ``head`` and ``tail``, and their ``relation``, each distinct row once."""
    synsets: dict[tuple[str, str], Synset] = {}
    for part_of_speech, name in FILES.items():
        path = only_file(folder, f"**/{name}")
        for number, line in enumerate(text_of(path).split("\n"), start=1):
            if line and not line.startswith("  "):  # the licence
                offset, synset = _parsed(line, f"line {number} of {name}")
                synsets[part_of_speech, offset] = synset
    seen = set()
    for synset in synsets.values():
        for row in _related(synset, synsets):
            if row not in seen:
                seen.add(row)
                head, tail, relation, text = row
                yield {"text": text, "head": head, "tail": tail, "relation": relation}


def _related(synset: Synset, synsets: dict[tuple[str, str], Synset]) -> Iterator[tuple[str, str, str, str]]:
    lowered = synset.gloss.lower()
    for pointer in synset.pointers:
        other = synsets.get(pointer.key)
        if pointer.symbol not in RELATIONS or other is None:
            continue
        head = synset.words[max(pointer.source - 1, 0)]
        tails = other.words[pointer.target - 1 : pointer.target] if pointer.target else other.words
        for tail in tails:
            found = None
            if tail.lower() in lowered:  # much faster than the expression, and rarely true
                found = re.search(rf"\b{re.escape(tail)}\b", synset.gloss, re.IGNORECASE)
            if found:
                before, after = synset.gloss[: found.start()], synset.gloss[found.end() :]
                text = f"<head> {head} </head> : {before}<tail> {found.group()} </tail>{after}"
                yield head, found.group(), RELATIONS[pointer.symbol], text
                break


def _parsed(line: str, where: str) -> tuple[str, Synset]:
    try:
        data, gloss = line.split(" | ", 1)
        fields = data.split()
        count = int(fields[3], 16)
        words = tuple(MARKER.sub("", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
        rest = fields[4 + 2 * count :]
        pointers = []
        for place in range(1, 1 + 4 * int(rest[0]), 4):
            symbol, offset, part_of_speech, ends = rest[place : place + 4]
            key = (part_of_speech.replace("s", "a"), offset)
            pointers.append(Pointer(symbol, key, int(ends[:2], 16), int(ends[2:], 16)))
        return fields[0], Synset(words, tuple(pointers), gloss.strip())
    except (ValueError, IndexError) as error:
        raise DataError(f"{where} of the package is no synset of WordNet.") from error
