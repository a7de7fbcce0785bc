"""The prepared corpus of a run, the same on every rank: prepared once, found by all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tf_dist.comm.agree import agree, on_root
from tf_dist.comm.base import Comm
from tf_dist.config import Config
from tf_dist.data.prepare import prepare
from tf_dist.data.prepared import Prepared, open_prepared
from tf_dist.data.registry import resolve_sources

DOWNLOADS = Path("data/downloads")


def prepared(config: Config, registry: Path, say: Callable[[str], object]) -> Prepared:
    """The tokens that ``config`` asks for, prepared now or found again; for one process.

    Raises:
        DataError, UsageError: see `tf_dist.data.prepare`.
    """
    return prepare(
        resolve_sources(config.data, registry, DOWNLOADS, say),
        text_column=config.text_column,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        val_fraction=config.val_fraction,
        seed=config.seed,
        errors=config.errors,
        max_bytes=config.max_bytes,
        folder=Path(config.prepared_dir),
        say=say,
    )


def shared_corpus(config: Config, comm: Comm, registry: Path, say: Callable[[str], object]) -> Prepared:
    """Prepare the tokens on rank 0, or find them, and open them on every rank.

    A rank that does not see rank 0's folder, on a node with a disk of its own, prepares for itself.

    Raises:
        DataError: the text is missing, unreadable or too short.
        LaunchError: ranks ended up with different tokens.
    """
    path = Path(on_root(comm, lambda: str(prepared(config, registry, say).path)))
    mine = open_prepared(path) if (path / "meta.json").exists() else prepared(config, registry, say)
    agree(comm, {name: mine.meta[name] for name in ("content_sha256", "tokenizer_sha256")}, "the data")
    return mine
