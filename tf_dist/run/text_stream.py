"""Text of a trained model as it comes: tokens in, whole characters out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tf_dist.data.tokenizer import Tokenizer
from tf_dist.decoding.forward import CachedForward
from tf_dist.errors import DataError
from tf_dist.run.generate import Sampling, continuation
from tf_dist.run.load_run import LoadedRun

UNFINISHED = ("\N{REPLACEMENT CHARACTER}", "\r")


def whole_characters(tokenizer: Tokenizer, prompt: Iterable[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of tokens that follow a prompt, in pieces: a character may need several tokens."""
    ids = [int(one) for one in prompt]
    shown = whole = tokenizer.decode(ids)
    for token in tokens:
        ids.append(token)
        whole = tokenizer.decode(ids)
        if not whole.endswith(UNFINISHED):
            yield whole[len(shown) :]
            shown = whole
    if len(whole) > len(shown):
        yield whole[len(shown) :]


class TextStream:
    """Continues texts with one model; one at a time.

    Args:
        run: loaded; a language model.
        forward: computes its logits.
    """

    def __init__(self, run: LoadedRun, forward: CachedForward) -> None:
        self._run, self._forward = run, forward

    def check(self, text: str) -> None:
        """Refuse a prompt with characters that the tokenizer does not have.

        Raises:
            DataError: with the character; or there is no text.
        """
        if not len(self._run.tokenizer.encode(text)):
            raise DataError("there is no text to go on from: type some")

    def __call__(self, text: str, tokens: int, sampling: Sampling) -> Iterator[str]:
        """Yield what follows a text, in pieces of whole characters.

        Args:
            text: the prompt.
            tokens: how many, at most.
            sampling: how they are chosen.

        Raises:
            DataError: as `check`.
        """
        from tf_dist.models.build import packed_end

        self.check(text)
        tokenizer = self._run.tokenizer
        prompt = tokenizer.encode(text)
        made = continuation(self._forward, prompt, tokens, sampling, packed_end(self._run.config))
        yield from whole_characters(tokenizer, prompt, made)
