"""``--init-from``: a new training whose weights begin as those of another one, of a file or a model folder.

Weights are matched by path and shape. Rank 0 reads, one tensor at a time, and every rank gets its shards, so
that any grid can begin from any source. What is loaded, new and left over is counted and said. A weight of
another shape is an error, except for rows of tokens behind a vocabulary that both have (special tokens).

The path is pinned when the run begins: to one checkpoint, so that a run that starts again at step 0 begins
with the same weights. A run that resumes from a checkpoint of its own does not come here.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tf_dist.checkpoint import store
from tf_dist.checkpoint.manifest import NAME, read_manifest
from tf_dist.checkpoint.sharded_state import Entry, write
from tf_dist.comm.formatting import some
from tf_dist.comm.runtime.consensus import everywhere, on_root
from tf_dist.config import Config
from tf_dist.config.data import DataOptions
from tf_dist.data.prepared_dataset import Prepared, sha256_of_file
from tf_dist.errors import CheckpointError, UsageError
from tf_dist.huggingface.folder import is_model_folder
from tf_dist.huggingface.options_of_folder import check_vocabulary, options_of_folder
from tf_dist.run import convert

if TYPE_CHECKING:
    from tf_dist.run.weight_sources import WeightSource
    from tf_dist.training.trainer import Trainer

LOG = logging.getLogger(__name__)
TOKENIZER = "tokenizer.json"
# Axis of the vocabulary in an embedding's weights.
VOCABULARY = {"embeddings": 0, "reverse_embeddings": 1}


def pinned(config: Config, resumed: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options that change: ``init_from``, pinned, and what comes with it; on rank 0.

    That is the tokenizer, and of a model folder of Hugging Face the sizes and kind of the model.

    Args:
        config: as given.
        resumed: facts of the checkpoint that the run resumes from; None: it begins at step 0.

    Raises:
        UsageError, CheckpointError: there are no such weights.
    """
    if not config.init_from or (resumed is None and config.resume not in ("auto", "never")):
        return {}
    tokenizer: object
    of_folder: dict[str, Any] = {}
    if resumed is None:
        path = _located(Path(config.init_from))
        found, tokenizer = str(path), _tokenizer_beside(path)
        if is_model_folder(path):
            of_folder = options_of_folder(path, config, bool(tokenizer))
    else:
        before = resumed.get("config")
        before = before if isinstance(before, dict) else {}
        found, tokenizer = str(before.get("init_from", "")), before.get("tokenizer")
        if not found:
            LOG.warning("--init-from is for a new training, and this one resumes from a checkpoint: not used")
            return {"init_from": "", "init_except": ""}
    if config.tokenizer == DataOptions.tokenizer and isinstance(tokenizer, str) and tokenizer:
        return {**of_folder, "init_from": found, "tokenizer": tokenizer}
    return {**of_folder, "init_from": found}


def _located(path: Path) -> Path:
    if is_model_folder(path):
        pass
    elif not convert.is_file_of_weights(path):
        path = _checkpoint_of(path)
    elif not path.is_file():
        raise UsageError(f"--init-from {path}: no such file")
    return Path(os.path.realpath(path))


def _checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest valid one of a run folder.

    Raises:
        UsageError: it is neither.
        CheckpointError: the run has no checkpoint, or no valid one.
    """
    if (path / NAME).exists():
        return path
    if not (path / "checkpoints").is_dir():
        raise UsageError(
            f"--init-from {path}: neither a run folder, nor a checkpoint, nor a file that ends in "
            f"{', '.join(convert.KINDS)}"
        )
    newest = store.newest(path / "checkpoints")
    if newest is None:
        raise CheckpointError(f"--init-from {path}: this run has no checkpoint yet")
    return newest


def _tokenizer_beside(path: Path) -> str:
    """The tokenizer of a checkpoint's run, or of a model folder; empty if there is none."""
    if is_model_folder(path):
        return str(path / TOKENIZER) if (path / TOKENIZER).is_file() else ""
    tokenizer = path.parent.parent / TOKENIZER
    return str(tokenizer) if path.parent.name == "checkpoints" and os.path.lexists(tokenizer) else ""


def check_tokenizer(config: Config, corpus: Prepared) -> None:
    """Refuse tokens of another tokenizer than the weights know; on rank 0.

    Raises:
        CheckpointError: its SHA-256 is another one.
    """
    path = Path(config.init_from)
    if is_model_folder(path):
        check_vocabulary(path, corpus.tokenizer.vocab_size)
    if not (path / NAME).exists():
        return  # a file of weights does not say; a run that resumes may have outlived the other one
    wanted = read_manifest(path)["facts"].get("tokenizer_sha256")
    if wanted is None and (tokenizer := _tokenizer_beside(path)):
        wanted = sha256_of_file(Path(tokenizer), follow=False)
    if wanted is not None and wanted != corpus.meta["tokenizer_sha256"]:
        raise CheckpointError(
            f"--init-from {path}: its weights know another tokenizer than {config.tokenizer!r}: every token "
            "would mean something else. Leave --tokenizer out, or give the tokenizer.json of that run"
        )


@dataclass
class InitPlan:
    """What happens to each weight of the model, by path.

    loaded: from the source. new: keeps its initial value. left: weights of the source that are not used.
    longer: of ``loaded``, embeddings with other numbers of tokens. frozen: of ``new``, those not trained.
    """

    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    longer: dict[str, int] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.loaded) + len(self.new)
        parts = [f"{len(self.loaded)} of {total} weights"]
        parts += [f"tokens {tokens:+d} in {path}" for path, tokens in self.longer.items()]
        parts += [f"{len(names)} {what}: {some(names)}" for what, names in self._others if names]
        return "; ".join(parts)

    @property
    def _others(self) -> list[tuple[str, list[str]]]:
        return [("new", self.new), ("left over there", self.left)]


def plan(
    weights: Mapping[str, tuple[tuple[int, ...], bool]],
    source: WeightSource,
    anew: Sequence[str],
    tokens: int,
) -> InitPlan:
    """Match the weights of a model with those of a source.

    Args:
        weights: shape of each, by path, and whether it is trained.
        source: of weights.
        anew: paths that are not to be loaded.
        tokens: V, of the tokenizer.

    Raises:
        CheckpointError: nothing matches, or a shape differs.
    """
    made = InitPlan()
    for path, (shape, trained) in weights.items():
        there = source.shapes.get(path)
        if there is None or path in anew:
            made.new.append(path)
            made.frozen += [] if trained else [path]
            continue
        if there != shape:
            made.longer[path] = _more_tokens(path, shape, there, tokens, source)
        made.loaded.append(path)
    if not made.loaded:
        raise CheckpointError(
            f"--init-from {source.said}: none of its weights ({some(list(source.shapes))}) is one of this "
            f"model ({some(list(weights))}); they are matched by path"
        )
    made.left = [path for path in source.shapes if path not in made.loaded] + source.left
    return made


def _more_tokens(
    path: str, shape: tuple[int, ...], there: tuple[int, ...], tokens: int, source: WeightSource
) -> int:
    """By how many tokens an embedding is longer than that of the source.

    Raises:
        CheckpointError: it is none, or differs in more than tokens behind the vocabulary.
    """
    axis = VOCABULARY.get(path.rsplit("/", 1)[-1])
    if axis is not None and source.config and len(there) == len(shape) == 2:
        same = shape[1 - axis] == there[1 - axis]
        if same and min(shape[axis], there[axis]) >= tokens:
            return shape[axis] - there[axis]
    own = [name for name in ("layers", "width", "seq_len") if name in source.config]
    known = ", ".join(f"--{name.replace('_', '-')} {source.config[name]}" for name in own)
    raise CheckpointError(
        f"--init-from {source.said}: {path} is {list(there)} there, and {list(shape)} in this model. "
        + (f"It was trained with {known}. " if known else "Use the sizes that it was trained with. ")
        + f"A weight that shall begin anew is named by --init-except '{path}'"
    )


def _check_heads(source: WeightSource, config: Config) -> None:
    """Refuse attention heads of another width: the shapes are the same, the function is not."""
    there = source.config.get("heads")
    if config.model == source.config.get("model") == "transformer" and there != config.heads:
        raise CheckpointError(
            f"--init-from {source.said}: it was trained with {there} attention heads, and these are "
            f"{config.heads}: its weights would mean something else. Use --heads {there}"
        )


def initialize(trainer: Trainer, config: Config, corpus: Prepared) -> None:
    """Set the initial weights of a trainer at step 0; a collective.

    Args:
        trainer: receives the weights; its optimizer is new.
        config: of the run, with ``init_from`` `pinned`.
        corpus: its tokens; only their tokenizer's vocabulary matters.

    Raises:
        CheckpointError: on every rank: nothing matches, a shape differs, or the source cannot be read.
    """
    from tf_dist.models.patterns import chosen
    from tf_dist.run.weight_sources import open_source

    state = trainer.whole()
    paths = {entry.name.split("/", 2)[-1]: entry for entry in state.weights}
    if len(paths) < len(state.weights):
        raise CheckpointError("two weights of this model have one path: give its layers different names")
    weights = {
        path: (entry.shape, bool(variable.trainable))
        for (path, entry), variable in zip(paths.items(), trainer.model.weights, strict=True)
    }
    found: list[WeightSource] = []

    def find() -> dict[str, Any]:
        source = open_source(Path(config.init_from), config).without_adapters_but(paths)
        _check_heads(source, config)
        _check_adapters(source, config, paths)
        names = list(paths)
        anew = [names[i] for i in chosen(names, config.init_except, "--init-except")]
        found.append(source)
        return dataclasses.asdict(plan(weights, source, anew, corpus.tokenizer.vocab_size))

    made = InitPlan(**on_root(trainer.comm, find))
    sharded = _read_by_all(trainer, config, found[0] if found else None)
    for path in made.loaded:
        entry = paths[path]
        if sharded is not None and path not in made.longer:
            write(entry, everywhere(trainer.comm, partial(_shards, sharded, path, entry)))
            continue
        own = next(iter(state.tensors([entry])))[1] if path in made.longer else None
        tensor = _fitting(found[0].read(path), own, path) if found else None
        state.set(entry, None if tensor is None else tensor.astype(entry.dtype, copy=False))
    LOG.info(f"initial weights: {made}, from {config.init_from}")
    if made.frozen:
        LOG.warning(
            f"{len(made.frozen)} weights are frozen and not in {config.init_from}: they stay "
            f"as they were drawn ({some(made.frozen)}). Exclude them from --freeze, as in "
            f"--freeze '*,!{made.frozen[0]}'"
        )


def _read_by_all(trainer: Trainer, config: Config, own: WeightSource | None) -> WeightSource | None:
    """The source, where every rank can read its shards itself; None: rank 0 reads for all. A collective."""
    from tf_dist.run.weight_sources import open_source

    path = Path(config.init_from)
    if not all(trainer.comm.allgather_obj(is_model_folder(path))):
        return None
    return own or open_source(path, config)


def _shards(source: WeightSource, path: str, entry: Entry) -> list[np.ndarray]:
    """Shards of a weight that this rank holds, 1-D each, for `tf_dist.checkpoint.sharded_state.write`."""
    assert source.read_shard is not None
    found = []
    for piece in entry.pieces:
        part = np.ascontiguousarray(source.read_shard(path, piece.part), entry.dtype)
        found.append(part.reshape(-1)[piece.start : piece.stop])
    return found


def _check_adapters(source: WeightSource, config: Config, paths: Mapping[str, Any]) -> None:
    from tf_dist.models.lora import has_adapters

    both = [path for path in source.shapes if path in paths]
    if has_adapters(both) and source.config and source.lora_scale != config.lora_alpha / config.lora_rank:
        raise CheckpointError(
            f"--init-from {source.said}: its adapters are scaled by {source.lora_scale:g}, and here by "
            f"{config.lora_alpha / config.lora_rank:g} (alpha / rank). Give its --lora-rank and --lora-alpha"
        )


def _fitting(tensor: np.ndarray, own: np.ndarray | None, path: str) -> np.ndarray:
    """A tensor of the source in the shape of the model's own, which has values for more tokens."""
    if own is None:
        return tensor
    fitting = np.array(own)
    axis = VOCABULARY[path.rsplit("/", 1)[-1]]
    both = min(own.shape[axis], tensor.shape[axis])
    index = (slice(None),) * axis + (slice(both),)
    fitting[index] = tensor[index]
    return fitting
