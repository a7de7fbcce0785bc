"""The tokens of a run, the same on every rank: prepared once, opened by all.

A model knows only the ids of its own tokenizer. So a run with a checkpoint uses the tokens and the tokenizer
recorded there, even if the files that they were made from have changed.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tf_dist.atomic_io import read_capped
from tf_dist.checkpoint.manifest import read_manifest
from tf_dist.checkpoint.store import listing
from tf_dist.comm.runtime.consensus import agree, everywhere, on_root
from tf_dist.comm.transport.base import Comm
from tf_dist.config import Config
from tf_dist.data.mixture import with_weights
from tf_dist.data.prepare import prepare
from tf_dist.data.prepared_dataset import (
    SIDES,
    Prepared,
    files_changed,
    find_prepared,
    open_prepared,
    sha256_of_file,
    spelled_mixture,
)
from tf_dist.data.registry import resolve_sources
from tf_dist.errors import CheckpointError, DataError, UsageError
from tf_dist.tasks.prepare import OPTIONS, prepare_examples
from tf_dist.tasks.registry import task_of

LOG = logging.getLogger(__name__)
DOWNLOADS = Path("data/downloads")
# In a run folder: the names of classes, in their order.
LABELS = "labels.json"
LABELS_LIMIT_BYTES = 64 << 20
# Options that determine the tokens, besides the files and the vocabulary size.
OF_DATA = ("data", "text_column", "tokenizer", "val_fraction", "seed", "errors", "max_bytes")
OF_EXAMPLES = tuple(name for name in OPTIONS if name not in ("vocab_size", *OF_DATA))


def prepared(config: Config, registry: Path) -> Prepared:
    """The tokens selected by ``config``, prepared or found; in one process.

    Raises:
        DataError, UsageError: see `tf_dist.data.prepare`.
    """
    values, weights = with_weights(config.data)
    sources, task = resolve_sources(values, registry, DOWNLOADS), task_of(config)
    if task.of_tables:
        if weights:
            raise UsageError(
                f"--data {config.data[0]}: only running text is drawn by weight, not the rows of "
                f"--task {config.task}. Leave the weights out"
            )
        return prepare_examples(task, config, sources)
    return prepare(
        sources,
        text_column=config.text_column,
        tokenizer=config.tokenizer,
        vocab_size=config.vocab_size,
        val_fraction=config.val_fraction,
        seed=config.seed,
        errors=config.errors,
        max_bytes=config.max_bytes,
        folder=Path(config.prepared_dir),
        weights=weights,
    )


def shared_corpus(config: Config, comm: Comm, registry: Path, run_dir: Path | None = None) -> Prepared:
    """Prepare or find the tokens on rank 0, and open them on every rank; a collective.

    A rank that does not see rank 0's folder, on a node with its own disk, prepares them itself.

    Args:
        config: selects them.
        comm: all ranks.
        registry: of data sets by name.
        run_dir: of a run that is resumed, if it has checkpoints. With the same data options it continues with
            its own tokens.

    Raises:
        DataError: the text is missing, unreadable or too short; on all ranks.
        LaunchError: ranks ended up with different tokens.
    """

    def find() -> Prepared:
        return _of_resumed(config, run_dir) or prepared(config, registry)

    return _on_all(comm, find)


def corpus_of_run(
    config: Config, content_sha256: str | None, comm: Comm, registry: Path, run_dir: Path
) -> Prepared:
    """The tokens that a model was trained on, found or made again by its tokenizer; a collective.

    Args:
        config: of the run.
        content_sha256: of its tokens, from its checkpoint; None for converted weights.
        comm: all ranks.
        registry: of data sets by name.
        run_dir: the run's folder, with its tokenizer.

    Raises:
        DataError: its tokens are gone and the corpus has changed, or cannot be read.
        LaunchError: ranks ended up with different tokens.
    """
    tokenizer = run_dir / "tokenizer.json"

    def find() -> Prepared:
        found = content_sha256 and find_prepared(
            Path(config.prepared_dir), content_sha256, sha256_of_file(tokenizer)
        )
        if found:
            if changed := files_changed(found, config.max_bytes):
                LOG.warning(
                    f"{changed} since the run was trained: these are the run's own tokens, in {found.path}"
                )
            return found
        return _made_again(config, content_sha256, tokenizer, registry)

    return _on_all(comm, find)


def other_corpus(config: Config, comm: Comm, registry: Path, run_dir: Path) -> Prepared:
    """All text selected by ``config`` in tokens of a run's tokenizer, as training side; a collective.

    Rows of a task are on the validation side, with the run's labels.

    Raises:
        DataError: the text is missing, unreadable, too short, or has characters that the tokenizer lacks.
        LaunchError: ranks ended up with different tokens.
    """
    config = dataclasses.replace(
        config, tokenizer=str(run_dir / "tokenizer.json"), vocab_size=0, val_fraction=0.0
    )
    task = task_of(config)
    if not task.of_tables:
        return _on_all(comm, lambda: prepared(config, registry))

    def find() -> Prepared:
        sources = resolve_sources(config.data, registry, DOWNLOADS)
        return prepare_examples(task, config, sources, labels_of(run_dir))

    return _on_all(comm, find)


def labels_of(run_dir: Path) -> list[str]:
    """The names of a run's classes, in their order; none, if it has no classes.

    Raises:
        DataError: the file is damaged.
    """
    path = run_dir / LABELS
    if not path.exists():
        return []
    try:
        return msgspec.json.decode(read_capped(path, LABELS_LIMIT_BYTES, follow=False), type=list[str])
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path} is damaged: {error}. Train the run again, or put its labels back") from error


def _on_all(comm: Comm, find: Callable[[], Prepared]) -> Prepared:
    path = Path(on_root(comm, lambda: str(find().path)))
    # Digests are compared: two disks may hold different tokens beside equal metadata.
    mine = everywhere(comm, lambda: open_prepared(path) if (path / "meta.json").exists() else find())
    folders = comm.allgather_obj(os.path.abspath(mine.path))
    apart = ", ".join(f"{folder} on rank {rank}" for rank, folder in enumerate(folders))
    where = f" ({apart})" if len(set(folders)) > 1 else ""
    facts = {name: mine.meta[name] for name in ("content_sha256", "tokenizer_sha256")}
    facts["mixture"] = spelled_mixture(mine.meta.get("mixture")).decode()
    samples = {f"{side}.bin": mine.meta["sample_sha256"][side] for side in SIDES}
    agree(comm, {**facts, **samples}, f"the data{where}")
    return mine


def _of_resumed(config: Config, run_dir: Path | None) -> Prepared | None:
    """The tokens of a run that is resumed with the same data options."""
    facts = newest_facts(config, run_dir)
    if facts is None or run_dir is None:
        return None
    now, before = config.as_dict(), facts.get("config")
    if not isinstance(before, dict):  # an edited folder; the resume itself reports it
        return None
    names = OF_DATA if config.task == Config.task else (*OF_DATA, *OF_EXAMPLES)
    same = all(now[name] == before.get(name) for name in names)
    if not same or config.vocab_size not in (0, before.get("vocab_size")):
        return None
    tokenizer = facts.get("tokenizer_sha256")
    if not isinstance(tokenizer, str) or not isinstance(facts.get("content_sha256"), str):
        return None
    found = find_prepared(Path(config.prepared_dir), facts["content_sha256"], tokenizer)
    if found and (changed := files_changed(found, config.max_bytes)):
        LOG.warning(
            f"{changed} since the run began: it continues with its own tokens, in {found.path}. "
            "With --resume never or another --run-dir, training starts with the new text"
        )
    return found


def newest_facts(config: Config, run_dir: Path | None) -> Mapping[str, Any] | None:
    """The facts of the newest checkpoint to be resumed from, whether its tensors are valid or not."""
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


def _made_again(config: Config, content_sha256: str | None, tokenizer: Path, registry: Path) -> Prepared:
    gone = (
        f"the run's tokens are not in {config.prepared_dir} any more, and the corpus is not what it was when "
        "they were made: {}. Put its files back, or use --data FILE to evaluate on another text"
    )
    config = dataclasses.replace(config, tokenizer=str(tokenizer))
    try:
        made = prepared(config, registry)
    except DataError as error:
        raise DataError(gone.format(error) if content_sha256 else str(error)) from error
    if content_sha256 is None:
        LOG.warning("the weights came from elsewhere: whether they were trained on this text is not known")
    elif made.meta["content_sha256"] != content_sha256:
        raise DataError(gone.format("its tokens are others now"))
    return made
