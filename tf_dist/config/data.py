"""Options of the data: which text, how it is cut into tokens, what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError

# Tokens of a BPE vocabulary where no number is given.
BPE_DEFAULT_VOCAB = 2048
option = partial(options.option, group="data")


@dataclass(frozen=True)
class DataOptions(options.Options):
    """Text, tokens and validation. Sizes in bytes of text or tokens."""

    data: tuple[str, ...] = option(
        ("stdlib",),
        text="files, globs, folders, a name of data/datasets.yaml, or `stdlib`: the Python standard "
        "library's own sources",
    )
    text_column: str = option(
        "text", text="column with the text in .csv .tsv .jsonl .parquet", metavar="COLUMN"
    )
    tokenizer: str = option(
        "bpe",
        text="byte, char, bpe (trained on the corpus), or the path of a tokenizer.json",
        metavar="byte|char|bpe|PATH",
    )
    vocab_size: int = option(
        0, text="vocabulary size; 0: as many tokens as needed (bpe: 2048)", least=0, on_resume="same"
    )
    val_fraction: float = option(
        0.1, text="fraction of the text held out for validation, split by document", least=0
    )
    errors: str = option(
        "strict",
        text="on bytes that are not UTF-8: stop, or replace and count them",
        choices=("strict", "replace"),
    )
    max_bytes: int = option(
        4_000_000, text="use at most this much of the stdlib corpus; 0: all of it", least=0
    )
    prepared_dir: str = option(
        "data/prepared", text="cache folder of tokenized data", metavar="FOLDER", on_resume="free"
    )

    def check(self) -> None:
        """Refuse a split that leaves nothing to train on."""
        if self.val_fraction >= 1:
            raise UsageError(
                f"val_fraction is {self.val_fraction}, which leaves nothing to train on; use 0.1"
            )
