"""Summary of a run before its first step: ranks, data, model, and the arithmetic of a batch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from tf_dist import faults
from tf_dist.comm.formatting import counted
from tf_dist.comm.runtime.thread_budget import Placement, places
from tf_dist.comm.transport.base import Comm
from tf_dist.config import Config
from tf_dist.config.data import PACKED
from tf_dist.data.mixture import mixture_of
from tf_dist.data.prepared_dataset import Prepared
from tf_dist.data.sampler import share
from tf_dist.parallel.sharding import part_of
from tf_dist.run.numerics_environment import slow_bfloat16
from tf_dist.tasks.registry import task_of
from tf_dist.training.trainer import Trainer
from tf_dist.version import __version__


def banner(
    config: Config, comm: Comm, corpus: Prepared, trainer: Trainer, steps: int, steps_per_epoch: int
) -> str:
    """The lines to print about a run; a collective."""
    meta = corpus.meta
    rows, T = config.global_batch_size, trainer.seq_len
    lines = {
        "tf_dist": f"{__version__}: {_ranks(config, comm)}",
        **({} if trainer.mesh.plain else {"grid": _grid(trainer)}),
        "data": f"{' '.join(config.data)}: {_amount(meta)} held out",
        **({"mixture": _mixture(trainer, corpus, steps)} if "mixture" in meta else {}),
        "tokenizer": f"{meta['tokenizer_kind']} of {meta['vocab_size']:,}, in {corpus.path}",
        **({} if config.task == Config.task else {"task": _task(config, meta)}),
        **({"documents": _documents(meta)} if config.documents == PACKED else {}),
        "model": f"{config.model}, {_parameters(trainer):,} parameters{_precision(config)}",
        "batch": f"{rows} sequences x {T} tokens = {rows * T:,} tokens a step, as {config.micro_batches} "
        f"micro-batches of {config.micro_batch_rows}; {_shares(config, trainer)}",
        "training": f"{steps:,} steps = {steps / steps_per_epoch:.2f} epochs, from step {trainer.step}; "
        f"{config.optimizer}, learning rate {config.learning_rate:g}, {config.schedule}; "
        f"strategy {_strategy(trainer)}",
        "compute": trainer.tuning.description,
        "sums": "; ".join(filter(None, [trainer.arrangement.description, trainer.runner.said])),
        "run": config.run_dir,
        **({"faults": f"armed by {faults.VARIABLE}: {faults.said()}"} if faults.said() else {}),
    }
    return "\n".join(f"{name:10}{text}" for name, text in lines.items())


def _amount(meta: Mapping[str, Any]) -> str:
    """How much there is to train on, and held out."""
    if "rows" in meta:
        return f"{meta['rows']['train']:,} rows to train on, {meta['rows']['val']:,}"
    tokens, text_bytes = meta["tokens"], meta["text_bytes"]["train"]
    return f"{tokens['train']:,} tokens ({text_bytes:,} bytes) to train on, {tokens['val']:,}"


def _mixture(trainer: Trainer, corpus: Prepared, steps: int) -> str:
    """The corpora of a mixture: share, rows, and how often each will have been read at the end."""
    mixture = mixture_of(corpus.rows("train", trainer.seq_len))
    assert mixture is not None
    passes = mixture.passes(steps * trainer.global_batch_size)
    each = [
        f"{part.weight:.3g} of {part.name}, {part.rows:,} sequences, read {passes[part.name]:.2f} times"
        for part in mixture.parts
    ]
    return "; ".join(each)


def _documents(meta: Mapping[str, Any]) -> str:
    """What packed documents there are to train on. The only one of a corpus has no end."""
    corpora = meta.get("mixture", [meta])
    without_end = [_is_one_document(one) for one in corpora]
    if all(without_end):
        return "a single one has no end: windows see all before them, as without --documents packed"
    return f"{meta['documents']['train']:,}, each of which is seen by itself"


def _is_one_document(meta: Mapping[str, Any]) -> bool:
    """Whether a corpus is a single document: split at a position, or not at all."""
    return bool(meta["split"] == "position" or (meta["split"] == "none" and meta["documents"]["train"] == 1))


def _task(config: Config, meta: Mapping[str, Any]) -> str:
    labels = meta.get("labels", [])
    return f"{config.task}, {task_of(config).architecture}" + (f", {len(labels)} labels" if labels else "")


def _strategy(trainer: Trainer) -> str:
    """Its name, and the ZeRO stage if it shards."""
    stage = trainer.strategy.traits.sharding
    return f"{trainer.strategy}{f', stage {stage}' if stage else ''}"


def _precision(config: Config) -> str:
    """The precision, with a warning if it brings no speed-up."""
    if config.precision == "float32":
        return ""
    slow = slow_bfloat16()
    return f", computed in {config.precision}" + (f", which will not be faster: {slow}" if slow else "")


def _ranks(config: Config, comm: Comm) -> str:
    everywhere = places(comm)
    hosts = Counter(place.host for place in everywhere)
    nodes = f"{len(hosts)} node{'s' * (len(hosts) > 1)} ({', '.join(sorted(hosts)[:4])})"
    threads = config.threads_per_rank or min(place.threads for place in everywhere)
    each = " each" if comm.size > 1 else ""
    text = f"{counted(comm.size)} on {nodes}, {threads} thread{'s' * (threads > 1)}{each}"
    return f"{text}, backend {config.backend}" + _idle_cores(config, everywhere[0], comm.size)


def _idle_cores(config: Config, place: Placement, size: int) -> str:
    """A hint if a launcher bound the only rank to some of the cores."""
    cores = os.cpu_count() or 1
    if size > 1 or config.threads_per_rank or len(place.cores) >= cores:
        return ""
    return f". It may use {len(place.cores)} of {cores} cores: start more ranks, or mpirun --bind-to none"


def _parameters(trainer: Trainer) -> int:
    """Number of parameters of the global model."""
    return sum(prod(part_of(variable).whole) for variable in trainer.model.trainable_variables)


def _grid(trainer: Trainer) -> str:
    """The mesh, and this rank's number of parameters; rank 0 prints it."""
    mine = trainer.replica.parameters
    return f"{trainer.mesh}; rank 0 has {mine:,} of the parameters"


def _shares(config: Config, trainer: Trainer) -> str:
    """Micro-batches of each rank, with a warning if some have none."""
    size = trainer.mesh.data.size
    shares = [len(share(config.micro_batches, rank, size)) for rank in range(size)]
    if min(shares) == max(shares):
        return f"{shares[0]} for each rank"
    text = f"ranks take {min(shares)} to {max(shares)}"
    if min(shares) == 0:
        text += f": {shares.count(0)} ranks have nothing to do, use a smaller --micro-batch-size"
    return text
