"""Context parallelism: memory per rank and step time for long rows, on 1, 2 and 4 ranks.

One row of T tokens for all ranks together, a Transformer of 2 layers of 384 with 6 heads, one thread a rank.
Memory is the peak of PSS in steps that are not the first ones, above what the same process took once a tiny
model had been trained (as in `tf_dist.bench.memory`). Weights, gradients and state are the same on every
rank; what falls with the number of ranks is activations, the formula of which stands beside it.

Started by whoever calls `measure`; there is no name for it in ``scripts/bench.py``.

Legend: T tokens, s ranks.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tf_dist.bench import memory, models, runner
from tf_dist.parallel import cost_model

MODULE = "tf_dist.bench.long_rows"
FOLDER = runner.FOLDER / "long_rows"
LENGTHS = (1024, 2048, 4096, 8192)
RANKS = (1, 2, 4)
SIZES: dict[str, Any] = {"model": "transformer", "layers": 2, "width": 384, "heads": 6}
WARM_UP, STEPS = 2, 4


def measure(lengths: Sequence[int] = LENGTHS, ranks: Sequence[int] = RANKS) -> list[dict[str, Any]]:
    """Start a job for each length and number of ranks, one after the other; what each found."""
    return [runner.measured(s, MODULE, str(T), folder=FOLDER) for T in lengths for s in ranks]


def table(jobs: list[dict[str, Any]]) -> str:
    """A line for each job; ratios are to the fewest ranks of the same length."""
    head = ["tokens", "np", "ms a step", "ratio", "MB of a rank", "formula", "sent MB", "formula"]
    rows = []
    for job in jobs:
        first = next(other for other in jobs if other["tokens"] == job["tokens"])
        sent, held = formulas(job["tokens"], job["ranks"], job["parameters"])
        cells = [
            f"{job['step_ms']:.0f}",
            f"{job['step_ms'] / first['step_ms']:.2f}",
            f"{memory.MB * job['peak']:.0f}",
            f"{memory.MB * held:.0f}",
            f"{memory.MB * job['sent']:.1f}",
            f"{memory.MB * sent:.1f}",
        ]
        rows.append([str(job["tokens"]), runner.ranks_named(job["ranks"]), *cells])
    return runner.table(head, rows)


def formulas(seq_len: int, ranks: int, parameters: int) -> tuple[float, float]:
    """Bytes that a rank sends for the ring in a step, and bytes that it holds beside the baseline.

    Gradients are there twice and a sum of them once, and the update takes one more, as `memory.formula` has
    it: 24 P with weights and Adam. Attention's weights are not kept, from 1,024 tokens on.
    """
    layers, width, heads = (SIZES[key] for key in ("layers", "width", "heads"))
    sent = cost_model.ring_bytes(1, seq_len, width, layers, ranks)
    sizes = (1, seq_len, layers, width, heads, models.VOCABULARY)
    return sent, 24 * parameters + cost_model.activation_bytes(*sizes, sequence=ranks, weights_kept=False)


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(seq_len: int, out: Path) -> None:
    """Take steps with one row of all ranks; the slowest rank's time, the mean rank's memory."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect(threads_per_rank=1)
    import numpy as np

    from tf_dist.bench import systems
    from tf_dist.config import Config
    from tf_dist.layers.context_parallel import sequence_parallel
    from tf_dist.models.build import build
    from tf_dist.parallel.mesh import Mesh
    from tf_dist.training.trainer import Trainer

    baseline = memory.used_once(comm)
    mesh = Mesh(comm, sequence=comm.size)
    config = Config(vocab_size=models.VOCABULARY, seq_len=seq_len, global_batch_size=1, **SIZES)
    model = build(config, sequence_parallel(mesh.sequence, seq_len))
    options: dict[str, Any] = {
        "global_batch_size": 1,
        "micro_batch_size": 1,
        "autotune": "off",
        "check_every": 0,
    }
    trainer = Trainer(model, systems.adamw(), comm, clip_norm=0.0, mesh=mesh, **options)
    tokens = np.random.default_rng(1).integers(0, models.VOCABULARY, 16 * seq_len + 1).astype(np.uint16)
    sequences = trainer.sequences(tokens)
    sampler = trainer.sampler(sequences)
    for _ in range(WARM_UP):
        trainer.train_step(sequences, sampler)
    taken, sent = [], float(comm.sent_bytes)
    for _ in range(STEPS):
        comm.barrier()
        begun = time.perf_counter()
        trainer.train_step(sequences, sampler)
        taken.append(time.perf_counter() - begun)
    sent = (comm.sent_bytes - sent) / STEPS
    # Apart: reading PSS takes a core for a good part of the time, which one rank alone has to spare.
    with memory.Watch() as watch:
        for _ in range(STEPS):
            trainer.train_step(sequences, sampler)
    mine = [statistics.median(taken), watch.peak_pss - baseline["pss"], sent]
    times, peaks, bytes_sent = zip(*comm.allgather_obj(mine), strict=True)
    found = {
        "tokens": seq_len,
        "ranks": comm.size,
        "parameters": trainer.replica.parameters,
        "step_ms": 1e3 * max(times),
        "peak": statistics.mean(peaks),
        "sent": max(bytes_sent),
    }
    if comm.rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main_on_ranks(int(sys.argv[1]), Path(sys.argv[2]))
