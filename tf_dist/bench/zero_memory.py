"""Memory of a rank with each ZeRO stage, in bytes per parameter, against its formula.

PSS counts a page that n processes share as one n-th in each, so that a shared window is counted once over all
ranks. What is read is the peak over steps that are not the first ones, as everywhere in bench-memory; what
Python, MPI, TensorFlow and Keras take, once a model of a few hundred parameters has been trained in the same
way, is taken off. The formulas are those of Rajbhandari et al. (2020) for float32 and Adam, with R ranks:

    allreduce  16            zero 1  8 + 8 / R        zero 2  4 + 12 / R        zero 3  16 / R

They count weights, one gradient and two moments. What a rank has beyond them: gradients of a micro-batch
while they are computed (all of them with allreduce and stage 1, and the same once more as one array; some
buckets, or a segment, in stages 2 and 3); sums of a tree with more than two micro-batches (`4 log2(M) / R`);
terms of the other ranks in a shared window; and activations, which a row of few tokens keeps small.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import memory, runner

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.zero_memory"
# 39.4 million parameters, in halves of layers of 1.6 and 3.3 million, which are gathered one at a time.
# Deeper models have more graphs, whose memory is not counted by any formula.
SIZES: dict[str, Any] = {"model": "transformer", "layers": 8, "width": 640, "heads": 4, "seq_len": 16}
WAYS = ("allreduce", "zero-1", "zero-2", "zero-3")
WARM_UP, STEPS = 2, 4


def formula(way: str, ranks: int) -> float:
    """Bytes of a rank for each float32 parameter, beside activations."""
    of_way = {
        "allreduce": 16.0,
        "zero-1": 8 + 8 / ranks,
        "zero-2": 4 + 12 / ranks,
        "zero-3": 16 / ranks,
    }
    return of_way[way]


def measured(way: str, ranks: int, folder: Path) -> dict[str, Any]:
    """Start a job; what its ranks take, ``bytes_per_parameter`` of the mean rank, and the formula."""
    found: dict[str, Any] = runner.measured(ranks, MODULE, way, folder=folder)
    return {**found, "formula": formula(way, ranks)}


def table(found: list[dict[str, Any]]) -> str:
    """Measured and formula for each way and number of ranks, in bytes for each parameter."""
    rows = [
        [
            one["way"],
            runner.ranks_named(one["ranks"]),
            f"{one['formula']:.1f}",
            f"{one['bytes_per_parameter']:.1f}",
            f"{one['bytes_per_parameter'] - one['formula']:+.1f}",
        ]
        for one in found
    ]
    return runner.table(["bytes of a rank per parameter", "np", "formula", "peak PSS", "beyond"], rows)


# On the ranks ------------------------------------------------------------------------------------


def options_of(way: str) -> dict[str, Any]:
    """The options that make a way."""
    update, _, stage = way.partition("-")
    return {"update": update, "zero_stage": int(stage or 1)}


def on_rank(comm: Comm, way: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """Train a tiny model, then this one; what the second takes beyond the first, of the mean rank."""
    from tf_dist.bench.models import TINY_GPT

    baseline, _ = _trained(comm, way, TINY_GPT)
    peak, parameters = _trained(comm, way, sizes)
    everyone = comm.allgather_obj(peak - baseline)
    beyond = sum(everyone) / comm.size
    return {
        "way": way,
        "ranks": comm.size,
        "parameters": parameters,
        "bytes_per_parameter": beyond / parameters,
        "bytes_of_ranks": everyone,
    }


def _trained(comm: Comm, way: str, sizes: dict[str, Any]) -> tuple[int, int]:
    """The peak of PSS in steps that are not the first ones, and the number of parameters."""
    from tf_dist.bench import systems

    options = options_of(way)
    # The model is told as well: with the third stage it is made without its weights.
    made = systems.trainer_of(
        comm, {**sizes, **options}, 1, micro_batches=1, **options, autotune="off", check_every=0
    )
    trainer, sequences, sampler = made
    for _ in range(WARM_UP):
        trainer.train_step(sequences, sampler)
    comm.barrier()
    with memory.Watch() as watch:
        for _ in range(STEPS):
            trainer.train_step(sequences, sampler)
    comm.barrier()
    return watch.peak_pss, trainer.replica.parameters


def main_on_ranks(way: str, out: Path) -> None:
    """Train in a way; rank 0 writes what was found."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    found = on_rank(comm, way, SIZES)
    if comm.rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main_on_ranks(sys.argv[1], Path(sys.argv[2]))
