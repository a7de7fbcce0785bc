"""Text to text: translation, summaries, answers in own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from tf_dist.data.records import Record
from tf_dist.data.tokenizer import Tokenizer
from tf_dist.data.tokens import Batch
from tf_dist.models.row_layout import TOKENS, Head, Slots
from tf_dist.tasks.base import EncodedRows, Task, Values, next_tokens


class TextToText(Task):
    """A source text -> a target text, token by token (Sutskever et al. 2014)."""

    roles: ClassVar[tuple[str, ...]] = ("source", "target")
    architectures: ClassVar[tuple[str, ...]] = ("encoder-decoder", "prefix-decoder")

    @property
    def target(self) -> Slots:
        """Slots of the target's tokens and its end."""
        return Slots(self.config.target_len or self.config.seq_len)

    def head(self, classes: int) -> Head:
        """Logits of tokens, (B, T, V)."""
        return Head(TOKENS, points=self.config.pointer_generator)

    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, labels: Sequence[str]) -> EncodedRows:
        """As in `Task`: the source, then the target after a separator."""
        x_NxS, cut = self.sources(records, tokenizer)
        x_NxT, y_NxT, more = self.targets(records, tokenizer)
        return EncodedRows(np.concatenate([x_NxS, x_NxT], axis=1), y_NxT, {"source": cut, "target": more})

    def targets(self, records: Sequence[Record], tokenizer: Tokenizer) -> tuple[Batch, Batch, int]:
        """Inputs and targets of the decoder for the texts of the last role, as of `next_tokens`."""
        layout = self.layout(tokenizer.vocab_size)
        ids = tokenizer.encode_batch([record.values[self.roles[-1]] for record in records])
        return next_tokens(ids, layout.target.count, layout.separator, tokenizer.end_of_text, layout.pad)

    def reference_of(self, values: Values) -> str:
        """The target text."""
        return values["target"]

    def decode(
        self,
        predictions_NxU: npt.NDArray[Any],
        tokenizer: Tokenizer,
        labels: Sequence[str],
        given: Sequence[Values],
    ) -> list[str]:
        """The texts up to the first end of text; special tokens are left out."""
        return [text_of(ids, tokenizer) for ids in predictions_NxU]


class Translate(TextToText):
    """Machine translation."""

    name = "translate"
    metrics = ("bleu", "chrf")


class Summarize(TextToText):
    """Summaries in own words (abstractive)."""

    name = "summarize"
    metrics = ("rouge_l",)


def text_of(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> str:
    """The text of predicted ids, up to the first end of text, without padding and special tokens."""
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    kept = ids[: ends[0]] if ends.size else ids
    return tokenizer.decode(kept[(kept >= 0) & (kept < tokenizer.vocab_size)])
