"""Prompts: of a file, and those that a run's own tokenizer can encode."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tf_dist.data.decoding import REPLACEMENT
from tf_dist.data.tokenizer import Ids, Tokenizer
from tf_dist.data.tokens import TokenArray
from tf_dist.errors import DataError
from tf_dist.untrusted_files import LINE_LIMIT_BYTES, lines, parsed_json

LOOKED_AT_TOKENS = 1024
PROMPT_CHARACTERS = 12


def example_prompt(tokenizer: Tokenizer, tokens: TokenArray) -> str:
    """An example prompt: a word of a text, shortened if it is long; empty if no word is suitable.

    Args:
        tokenizer: that made the tokens.
        tokens: of the text, shape (tokens,).
    """
    words = tokenizer.decode(tokens[:LOOKED_AT_TOKENS]).split()
    # Words are easier to type than punctuation.
    for word in sorted((word[:PROMPT_CHARACTERS] for word in words), key=lambda word: not word[0].isalpha()):
        if word.isprintable() and REPLACEMENT not in word and _can_encode(tokenizer, word):
            return word
    return ""


def start_of_text(tokenizer: Tokenizer) -> Ids:
    """Default prompt: a line feed, or end-of-text."""
    if _can_encode(tokenizer, "\n"):
        return tokenizer.encode("\n")
    return np.array([tokenizer.end_of_text], dtype=np.uint32)


def read_prompts(path: Path | str) -> list[tuple[int, str]]:
    """The prompts in a file, with the numbers of their lines: one a line.

    A line of a ``.jsonl`` file is a JSON string, or an object whose ``prompt`` is one: so a prompt may have
    several lines.

    Raises:
        DataError: the file cannot be read or has no lines; a line is empty, too long, not UTF-8 or such JSON.
    """
    found = []
    try:
        for number, line in enumerate(lines(path, follow=True), 1):
            found.append((number, _prompt_of(line, f"{path}, line {number}", str(path).endswith(".jsonl"))))
    except OSError as error:
        raise DataError(f"cannot read prompts: {error}") from error
    if not found:
        raise DataError(f"{path} has no prompts: write one in each line")
    return found


def _prompt_of(line: bytes, where: str, is_json: bool) -> str:
    if len(line) == LINE_LIMIT_BYTES:
        raise DataError(f"{where} is too long: a line has less than {LINE_LIMIT_BYTES:,} bytes")
    try:
        text = line.decode().rstrip("\r\n")
        value = parsed_json(text) if is_json else text
    except ValueError as error:
        raise DataError(f"{where} is not {'JSON' if is_json else 'UTF-8'}: {error}") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt:
        wanted = "a JSON string, or an object with a prompt" if is_json else "a prompt"
        raise DataError(f"{where} is empty, or no prompt: {wanted} is needed, of at least one character")
    return prompt


def _can_encode(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return len(tokenizer.encode(text)) > 0
    except DataError:
        return False
