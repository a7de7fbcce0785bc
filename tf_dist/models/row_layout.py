"""How the words of a row are laid out: a source, then a target, each a fixed number of slots.

A row is one array of 32-bit words, whatever its task, so that all between data and model moves rows as they
are. A slot of text is one word, a token id. A slot of frames or patches is M float16 values, two in a word.
"""

from __future__ import annotations

from dataclasses import dataclass

VALUES_OF_A_WORD = 2
TOKENS, CLASSES, SPANS, FRAMES = "tokens", "classes", "spans", "frames"
# Special tokens, with ids that follow the tokenizer's.
SPECIAL_TOKENS = ("<pad>", "<sep>", "<mask>")


@dataclass(frozen=True)
class Head:
    """What a model predicts: `TOKENS`, one of ``size`` `CLASSES`, `SPANS`, or `FRAMES` of ``size`` values.

    points: whether a token can also be one of the source (`tf_dist.models.pointer_generator`).
    """

    kind: str
    size: int = 0
    points: bool = False


@dataclass(frozen=True)
class Slots:
    """Consecutive slots of a row. count: how many. width: M, values of each; 0 for token ids."""

    count: int
    width: int = 0

    @property
    def words(self) -> int:
        """Words of a row that they take."""
        return self.count * (self.width // VALUES_OF_A_WORD if self.width else 1)


@dataclass(frozen=True)
class RowLayout:
    """A row's source and target, and its vocabulary.

    source: S slots. target: T slots, none for an encoder. tokenizer_vocab: V, ids of the tokenizer.
    """

    source: Slots
    target: Slots
    tokenizer_vocab: int

    @property
    def words(self) -> int:
        """W, words of a row."""
        return self.source.words + self.target.words

    def outputs(self, head: Head) -> tuple[int, int]:
        """The shape of what a model predicts of a row: targets, and logits or values of each."""
        predicted = self.target.count or self.source.count
        return {
            TOKENS: (predicted, self.vocab_size),
            CLASSES: (1, head.size),
            SPANS: (2, self.source.count),
            FRAMES: (predicted, head.size),
        }[head.kind]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table: the tokenizer's ids and the special tokens."""
        return self.tokenizer_vocab + len(SPECIAL_TOKENS)

    @property
    def pad(self) -> int:
        """Id of the token that fills the end of a source or target."""
        return self.tokenizer_vocab + SPECIAL_TOKENS.index("<pad>")

    @property
    def separator(self) -> int:
        """Id of the token that begins a target."""
        return self.tokenizer_vocab + SPECIAL_TOKENS.index("<sep>")

    @property
    def mask(self) -> int:
        """Id of the token that hides another one (masked language models)."""
        return self.tokenizer_vocab + SPECIAL_TOKENS.index("<mask>")
