"""The tokens of a run, the same on every rank: prepared once, found by all, not derived anew behind its back.

A model knows only the ids of its own tokenizer. So where a run has a checkpoint, what counts are the tokens
and the tokenizer that the checkpoint tells of, whatever has become of the files they were made from.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tf_dist.comm.agree import agree, everywhere, on_root
from tf_dist.comm.base import Comm
from tf_dist.config import Config
from tf_dist.data.prepare import prepare
from tf_dist.data.prepared import (
    SIDES,
    Prepared,
    files_changed,
    find_prepared,
    open_prepared,
    sha256_of_file,
)
from tf_dist.data.registry import resolve_sources
from tf_dist.errors import CheckpointError, DataError
from tf_dist.training.checkpoint import listing
from tf_dist.training.manifest import read_manifest

DOWNLOADS = Path("data/downloads")
# Options that decide which tokens a run has, besides its files and the size of the vocabulary.
OF_DATA = ("data", "text_column", "tokenizer", "val_fraction", "seed", "errors", "max_bytes")
Say = Callable[[str], object]


def prepared(config: Config, registry: Path, say: Say) -> Prepared:
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


def shared_corpus(
    config: Config, comm: Comm, registry: Path, say: Say, run_dir: Path | None = None
) -> Prepared:
    """Prepare the tokens on rank 0, or find them, and open them on every rank; a collective.

    A rank that does not see rank 0's folder, on a node with a disk of its own, prepares for itself.

    Args:
        config: says which.
        comm: all ranks.
        registry: of data sets by name.
        say: told what is done.
        run_dir: of a run that is resumed from its checkpoints, if it has any. If it asked for the same data,
            it goes on with the tokens that it began with.

    Raises:
        DataError: the text is missing, unreadable or too short; on all ranks.
        LaunchError: ranks ended up with different tokens.
    """

    def find() -> Prepared:
        return _of_resumed(config, run_dir, say) or prepared(config, registry, say)

    return _on_all(comm, find)


def corpus_of_run(
    config: Config, content_sha256: str | None, comm: Comm, registry: Path, say: Say, run_dir: Path
) -> Prepared:
    """The tokens that a model was trained on: found, or made again by its own tokenizer; a collective.

    Args:
        config: of the run.
        content_sha256: of its tokens, as its checkpoint says; None where weights came from elsewhere.
        comm: all ranks.
        registry: of data sets by name.
        say: told what is done, and that the corpus is not what it was.
        run_dir: the run's folder, with its tokenizer.

    Raises:
        DataError: its tokens are gone, and the corpus is not what it was; or it cannot be read.
        LaunchError: ranks ended up with different tokens.
    """
    tokenizer = run_dir / "tokenizer.json"

    def find() -> Prepared:
        found = content_sha256 and find_prepared(
            Path(config.prepared_dir), content_sha256, sha256_of_file(tokenizer)
        )
        if found:
            if changed := files_changed(found, config.max_bytes):
                say(f"{changed} since the run was trained: these are the run's own tokens, in {found.path}")
            return found
        return _made_again(config, content_sha256, tokenizer, registry, say)

    return _on_all(comm, find)


def other_corpus(config: Config, comm: Comm, registry: Path, say: Say, run_dir: Path) -> Prepared:
    """All the text that ``config`` asks for, in tokens of a run's tokenizer, as training side; a collective.

    Raises:
        DataError: the text is missing, unreadable, too short, or has characters that the tokenizer lacks.
        LaunchError: ranks ended up with different tokens.
    """
    config = dataclasses.replace(
        config, tokenizer=str(run_dir / "tokenizer.json"), vocab_size=0, val_fraction=0.0
    )
    return _on_all(comm, lambda: prepared(config, registry, say))


def _on_all(comm: Comm, find: Callable[[], Prepared]) -> Prepared:
    path = Path(on_root(comm, lambda: str(find().path)))
    # What lies there is compared with its digests: two disks may hold other tokens beside equal facts.
    mine = everywhere(comm, lambda: open_prepared(path) if (path / "meta.json").exists() else find())
    folders = comm.allgather_obj(os.path.abspath(mine.path))
    apart = ", ".join(f"{folder} on rank {rank}" for rank, folder in enumerate(folders))
    where = f" ({apart})" if len(set(folders)) > 1 else ""
    facts = {name: mine.meta[name] for name in ("content_sha256", "tokenizer_sha256")}
    samples = {f"{side}.bin": mine.meta["sample_sha256"][side] for side in SIDES}
    agree(comm, {**facts, **samples}, f"the data{where}")
    return mine


def _of_resumed(config: Config, run_dir: Path | None, say: Say) -> Prepared | None:
    """The tokens that a run began with, where it is resumed and asks for the same data again."""
    facts = _newest_facts(config, run_dir)
    if facts is None or run_dir is None:
        return None
    now, before = config.as_dict(), facts.get("config")
    if not isinstance(before, dict):  # of a folder that somebody has edited; the resume itself will tell
        return None
    same = all(now[name] == before.get(name) for name in OF_DATA)
    if not same or config.vocab_size not in (0, before.get("vocab_size")):
        return None
    tokenizer = facts.get("tokenizer_sha256")
    if not isinstance(tokenizer, str) or not isinstance(facts.get("content_sha256"), str):
        return None
    found = find_prepared(Path(config.prepared_dir), facts["content_sha256"], tokenizer)
    if found and (changed := files_changed(found, config.max_bytes)):
        say(
            f"{changed} since the run began: it goes on with the tokens it began with, in {found.path}. "
            "With --resume never or another --run-dir, training begins anew with the new text"
        )
    return found


def _newest_facts(config: Config, run_dir: Path | None) -> Mapping[str, Any] | None:
    """What the newest checkpoint that is to be resumed from says of its run, be its tensors sound or not."""
    if run_dir is None or config.resume == "never":
        return None
    wanted = Path(config.resume)
    folder = run_dir / "checkpoints" if config.resume == "auto" else wanted / "checkpoints"
    one = (wanted / "manifest.json").exists()
    for path in [wanted] if one else reversed(listing(folder)):
        try:
            facts: dict[str, Any] = read_manifest(path)["facts"]
            return facts
        except CheckpointError:
            continue
    return None


def _made_again(
    config: Config, content_sha256: str | None, tokenizer: Path, registry: Path, say: Say
) -> Prepared:
    gone = (
        f"the run's tokens are not in {config.prepared_dir} any more, and the corpus is not what it was when "
        "they were made: {}. Put its files back, or use --data FILE to evaluate on another text"
    )
    config = dataclasses.replace(config, tokenizer=str(tokenizer))
    try:
        made = prepared(config, registry, say)
    except DataError as error:
        raise DataError(gone.format(error) if content_sha256 else str(error)) from error
    if content_sha256 is None:
        say("the weights came from elsewhere: whether they were trained on this text is not known")
    elif made.meta["content_sha256"] != content_sha256:
        raise DataError(gone.format("its tokens are others now"))
    return made
