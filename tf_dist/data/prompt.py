"""Prompts that a run's own tokenizer can encode."""

from __future__ import annotations

import numpy as np

from tf_dist.data.decoding import REPLACEMENT
from tf_dist.data.tokenizer import Ids, Tokenizer
from tf_dist.data.tokens import TokenArray
from tf_dist.errors import DataError

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


def _can_encode(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return len(tokenizer.encode(text)) > 0
    except DataError:
        return False
