"""`Decoded`: what was made of one prompt."""

from __future__ import annotations

from typing import NamedTuple


class Decoded(NamedTuple):
    """The continuation of a prompt.

    ids: its tokens, without the prompt and the end of text. log_probability: the model's, in nats, of these
    and of the end, if it has ended. score: what beam search compares; otherwise the same as log_probability.
    ended: whether the end of text followed; else it was cut at the greatest number of tokens.
    """

    ids: tuple[int, ...]
    log_probability: float
    score: float
    ended: bool
