"""Validate an untrusted ``tokenizer.json``.

Patterns must terminate on every text, ids must fit a vocabulary, and replacements must not turn a page into
gigabytes. The library `tokenizers` does not check this, and panics on some files, which Python sees as an
exception that is no `Exception`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tf_dist.errors import DataError, TfDistError
from tf_dist.untrusted_files import shown

# The largest vocabularies in use have about 260,000 tokens. A model needs a row for each id.
LARGEST_ID = 1 << 23
# Length of a pattern, prefix or replacement. Normalization tables (in Base64) are longer.
LONGEST_TEXT, TABLE = 4096, "precompiled_charsmap"
# How many times longer all replacements in sequence may make a text.
MOST_GROWTH = 64
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
UNBOUNDED = re.compile(r"[*+]|\{\d+,\}")
QUANTIFIER = re.compile(r"[*+?]|\{\d+(?:,\d*)?\}")


def check(fields: dict[str, Any], path: Path) -> None:
    """Refuse a tokenizer that could not be used, or not in reasonable time.

    Args:
        fields: of its file.
        path: of the file.

    Raises:
        DataError: with the reason.
    """
    model = fields.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    added = fields.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    wrong = [number for number in ids if not (isinstance(number, int) and 0 <= number < LARGEST_ID)]
    if wrong:
        raise DataError(f"{path}: token id {shown(wrong[0])} cannot be: no model has so many rows.")
    growth = 1.0
    for step in STEPS:
        for text, key in _texts(fields.get(step)):
            if len(text) > LONGEST_TEXT and key != TABLE:
                raise DataError(f"{path}: a {key} of the {step} has {len(text):,} characters.")
            if key == "Regex" and (group := endless(text)):
                raise DataError(
                    f"{path}: the pattern {shown(text)} of the {step} repeats {shown(group)}, in which the "
                    "same text can match in many ways: on some texts it would never end. Write it without "
                    "a repetition inside a repetition."
                )
        growth *= _growth(fields.get(step))
    if growth > MOST_GROWTH:
        raise DataError(f"{path}: its replacements can make a text {growth:,.0f} times as long.")


def is_text(characters: str) -> bool:
    """Whether a string is valid text: it has no unpaired surrogates."""
    return bool(characters) and not any("\ud800" <= one <= "\udfff" for one in characters)


@contextlib.contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Convert any exception of the library, also a panic, to an error with an explanation.

    Raises:
        DataError: instead.
    """
    try:
        yield
    except (TfDistError, MemoryError):
        raise
    except Exception as error:  # the library raises plain Exception for a file it cannot read
        raise DataError(f"{what}: {str(error)[:300]}. Use another tokenizer.json.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what}: {str(error)[:300]}. Use another tokenizer.json.") from error


def endless(pattern: str) -> str:
    """A repeated group of a regular expression that can match in many ways; empty if there is none.

    Such a pattern (catastrophic backtracking) takes time that doubles with each character of some texts.
    Detects a group repeated without bound that contains a choice or another repetition: some harmless
    patterns are refused as well, but none that published tokenizers use.
    """
    # Escapes and classes become one letter, which quantifiers may follow: the target is (a+)+.
    plain = re.sub(r"\\[pP]\{[^}]*\}|\\x\{[^}]*\}|\\.", "e", pattern, flags=re.DOTALL)
    plain = re.sub(r"\[\^?\]?(?:[^\]\[]|\[:?[^\]]*\])*\]", "c", plain)
    begun: list[int] = []
    for at, sign in enumerate(plain):
        if sign == "(":
            begun.append(at)
        elif sign == ")" and begun:
            start = begun.pop()
            inner = re.sub(r"\(\?(?:[a-zA-Z-]*:|<?[=!]|>|<\w+>)", "(", plain[start + 1 : at])
            inner = inner.removeprefix("?:")
            if UNBOUNDED.match(plain, at + 1) and ("|" in inner or QUANTIFIER.search(inner)):
                return plain[start : at + 2]
    return ""


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings in a part of a tokenizer, with the key of each."""
    if isinstance(value, str):
        yield value, key
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _texts(one, str(name))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, key)


def _growth(value: Any) -> float:
    """Maximum growth factor of a text under the replacements in a part of a tokenizer."""
    if isinstance(value, list):
        growth = 1.0
        for one in value:
            growth *= _growth(one)
        return growth
    if not isinstance(value, dict):
        return 1.0
    growth = 1.0
    pattern, content = value.get("pattern"), value.get("content")
    if value.get("type") == "Replace" and isinstance(content, str):
        found = pattern.get("String", "") if isinstance(pattern, dict) else ""
        growth = max(1.0, len(content) / max(1, len(found) if isinstance(found, str) else 1))
    for one in value.values():
        growth *= _growth(one)
    return growth
