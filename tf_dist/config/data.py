"""Options of the data: which text, how it is cut into tokens, what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError

# Tokens of a BPE vocabulary where no number is given.
BPE_DEFAULT_VOCAB = 2048
PACKED = "packed"
option = partial(options.option, group="data")


@dataclass(frozen=True)
class DataOptions(options.Options):
    """Text, tokens and validation. Sizes in bytes of text or tokens."""

    data: tuple[str, ...] = option(
        ("stdlib",),
        text="files, globs, folders, a name of data/datasets.yaml, or `stdlib`: the Python standard "
        "library's own sources; with weights, rows are drawn in these shares: a.jsonl:0.7 b/:0.3",
    )
    documents: str = option(
        "windows",
        text="what a token of running text sees: all its window, or packed: its own document only",
        choices=("windows", "packed"),
        on_resume="same",
    )
    end_of_text: int = option(
        -1,
        text="with packed documents: id of the token that ends one; -1: the tokenizer's",
        least=-1,
        on_resume="same",
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

    def check_documents(self, model: str, sequence_parallel: int) -> None:
        """Refuse packed documents where nothing keeps them apart.

        Args:
            model: as in `tf_dist.config.model.ModelOptions`.
            sequence_parallel: how many ranks split the tokens of a row.

        Raises:
            UsageError: with what can be done instead.
        """
        if self.documents != PACKED:
            return
        if model == "lstm":
            raise UsageError(
                "documents packed with model lstm: its state goes on from one document to the next. Use "
                "model transformer, or documents windows"
            )
        if sequence_parallel > 1:
            raise UsageError(
                f"documents packed with sequence_parallel {sequence_parallel}: ranks that have a part of a "
                "row do not see where its documents end. Use sequence_parallel 1 with tensor_parallel or "
                "pipeline_parallel, or documents windows"
            )
