"""What ``--dry-run`` says: the time of a step, that of the run, and the memory of the largest rank."""

from __future__ import annotations

import resource
import statistics
import time

import numpy as np

from tf_dist.comm.runtime.memory_limits import gib
from tf_dist.data.rows import Rows
from tf_dist.training.trainer import Trainer

# The first step compiles; the others are measured.
STEPS = 4


def measured(trainer: Trainer, rows: Rows, steps: int) -> str:
    """Take a few steps and say what they cost; a collective.

    Args:
        trainer: at step 0; its weights change, and nothing is saved.
        rows: to train on.
        steps: of the whole run.
    """
    sampler = trainer.sampler(rows)
    times, tokens = [], 0.0
    for _ in range(STEPS):
        begun = time.perf_counter()
        tokens = float(trainer.train_step(rows, sampler)["tokens"])
        times.append(time.perf_counter() - begun)
    step_s = statistics.median(times[1:])
    peak = np.array([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0])
    largest = max(trainer.comm.allgather_obj(float(peak[0])))
    hours, minutes = divmod(round(step_s * steps / 60), 60)
    return "\n".join(
        [
            f"parameters   {sum(int(np.prod(one.shape)) for one in trainer.model.trainable_variables):,}",
            f"compilation  {times[0] - step_s:.1f} s",
            f"step         {step_s * 1e3:.1f} ms, {tokens / step_s:,.0f} tokens/s",
            f"run          {steps:,} steps: {hours} h {minutes} min, without validation and checkpoints",
            f"memory       {gib(int(largest))} on the largest of {trainer.comm.size} ranks",
            "dry run: nothing was written",
        ]
    )
