"""Loss over held-out tokens, distributed among all ranks."""

from __future__ import annotations

import math

import numpy as np

from tf_dist import progress
from tf_dist.data.mixture import RowsOfPart, mixture_of
from tf_dist.data.rows import Rows
from tf_dist.data.sampler import share
from tf_dist.errors import DataError
from tf_dist.parallel.mesh import DATA, Mesh
from tf_dist.parallel.totals import CORRECT, LOSS, TOKENS, Totals
from tf_dist.runners.runner import MicroBatch, ModelRunner

# Its exponential is still a float64.
LARGEST_LOSS = 700.0


def validated(
    runner: ModelRunner, mesh: Mesh, rows: int, sequences: Rows, text_bytes: int
) -> dict[str, float]:
    """Compute the logs of `Trainer.validate`; a collective.

    Of a mixture they are means of its corpora by weight, and ``val_loss_NAME`` is the loss of each; a corpus
    of which nothing is held out does not count.

    Args:
        runner: computes losses.
        mesh: all ranks.
        rows: B, of a micro-batch.
        sequences: held out.
        text_bytes: UTF-8 bytes of their text; 0 if unknown.

    Raises:
        DataError: on every rank: there is no validation data.
    """
    mixture = mixture_of(sequences)
    parts = [] if mixture is None else [part for part in mixture.parts if part.rows]
    if not parts:
        return _of_rows(runner, mesh, rows, sequences, text_bytes)
    each = [_of_rows(runner, mesh, rows, RowsOfPart(sequences, part), 0) for part in parts]
    total = math.fsum(part.weight for part in parts)
    logs = {
        key: math.fsum(part.weight * one[key] for part, one in zip(parts, each, strict=True)) / total
        for key in ("val_loss", "val_accuracy")
    }
    logs["perplexity"] = math.exp(min(logs["val_loss"], LARGEST_LOSS))
    return logs | {f"val_loss_{part.name}": one["val_loss"] for part, one in zip(parts, each, strict=True)}


def _of_rows(
    runner: ModelRunner, mesh: Mesh, rows: int, sequences: Rows, text_bytes: int
) -> dict[str, float]:
    totals = Totals(math.ceil(len(sequences) / rows))
    indices = np.arange(totals.micro_batches * rows)
    indices[indices >= len(sequences)] = -1
    mine = share(totals.micro_batches, mesh.at[DATA], mesh.shape[DATA])
    batches = [MicroBatch(k, *sequences.rows(indices[k * rows : (k + 1) * rows])) for k in mine]
    with progress.task("validating", len(batches), "micro-batches") as task:
        runner.evaluate(progress.CountedSequence(batches, task), totals)
    sums = totals.reduce(mesh.all)
    if not sums[TOKENS]:
        raise DataError("there is no validation text: raise --val-fraction, or set --eval-every 0")
    loss = float(sums[LOSS] / sums[TOKENS])
    logs = {
        "val_loss": loss,
        "val_accuracy": float(sums[CORRECT] / sums[TOKENS]),
        "perplexity": math.exp(min(loss, LARGEST_LOSS)),
    }
    if text_bytes:
        logs["bits_per_byte"] = float(sums[LOSS] / math.log(2) / text_bytes)
    return logs
