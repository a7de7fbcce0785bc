"""Loss over held-out tokens, shared out among all ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tf_dist import faults, progress
from tf_dist.data.sampler import share
from tf_dist.data.tokens import Sequences
from tf_dist.errors import DataError
from tf_dist.parallel.mesh import DATA
from tf_dist.parallel.totals import CORRECT, LOSS, TOKENS, Totals

if TYPE_CHECKING:
    from tf_dist.training.trainer import Trainer


def validated(trainer: Trainer, sequences: Sequences, text_bytes: int) -> dict[str, float]:
    """What `Trainer.validate` returns; a collective.

    Raises:
        DataError: there is nothing to validate on.
    """
    faults.at("validation")
    trainer.meet()
    rows, mesh = trainer.rows, trainer.mesh
    totals = Totals(math.ceil(len(sequences) / rows))
    indices = np.arange(totals.micro_batches * rows)
    indices[indices >= len(sequences)] = -1
    mine = share(totals.micro_batches, mesh.at[DATA], mesh.shape[DATA])
    batches = [trainer.micro_batch(sequences, number, indices[number * rows :]) for number in mine]
    with progress.task("validating", len(batches), "micro-batches") as task:
        trainer.passes.evaluate(progress.Counted(batches, task), totals)
    sums = totals.reduce(trainer.comm)
    if not sums[TOKENS]:
        raise DataError("there is no validation text: raise --val-fraction, or set --eval-every 0")
    loss = float(sums[LOSS] / sums[TOKENS])
    logs = {
        "val_loss": loss,
        "val_accuracy": float(sums[CORRECT] / sums[TOKENS]),
        "perplexity": math.exp(min(loss, 700.0)),
    }
    if text_bytes:
        logs["bits_per_byte"] = float(sums[LOSS] / math.log(2) / text_bytes)
    return logs
