"""Campaign against numbers: NaN in the gradients of a rank, a flipped bit in its weights.

    python scripts/bench.py faults numbers             # 20 of each on 3 ranks, in one job
    python scripts/bench.py faults numbers seeds=5

Who is hit, when and where is drawn from the seed. With NaN all ranks must skip the steps that were hit, name
the rank, and end with the weights of one rank alone that skips the same steps. With a flipped bit they must
name the rank, and end with the weights of a run in which nothing happened.
"""

from __future__ import annotations

import json
import logging
import random
import sys
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist import faults
from tf_dist.bench import runner
from tf_dist.faults.spec import parse

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.faults.numbers"
RANKS, SEEDS, STEPS, EVERY = 3, 20, 24, 8
MOST_LINES = 1000
KINDS = ("nan", "bitflip")


def main(seeds: int, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run all seeds; what became of each, by kind."""
    return dict(runner.measured(RANKS, MODULE, str(seeds), folder=folder))


def drawn(kind: str, ranks: int, seed: int) -> str:
    """A fault, as TF_DIST_FAULT has it."""
    chance = random.Random(f"{kind} {ranks} {seed}")  # noqa: S311 - nothing secret
    where = f"rank={chance.randrange(ranks)},step={chance.randrange(2, STEPS - 3)},seed={seed}"
    if kind == "nan":
        return f"nan:{where},times={chance.randrange(1, 4)}"
    return f"bitflip:{where},phase={chance.choice(('step', 'forward', 'gradient', 'update'))}"


def sound(found: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether all have ended as they must."""
    return all(one["same"] and one["named"] and one["done"] for kind in KINDS for one in found[kind])


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each kind."""
    rows = []
    for kind in KINDS:
        runs = found[kind]
        counts = [sum(bool(one[key]) for one in runs) for key in ("same", "named", "done")]
        done = "steps skipped" if kind == "nan" else "steps taken again"
        rows.append([kind, *(f"{count} of {len(runs)}" for count in counts), done])
    return runner.table(["numbers, 3 ranks", "same weights", "rank named", "done", "what"], rows)


# On ranks -----------------------------------------------------------------------------------------


def on_ranks(seeds: int, out: Path) -> None:
    """Train once for each kind and seed; rank 0 writes what became of them."""
    from tf_dist.comm.runtime import launch
    from tf_dist.comm.transport.base import SerialComm

    comm, found = launch.connect(), dict[str, list[dict[str, Any]]]()
    calm, _, _ = trained(comm, "")
    for kind in KINDS:
        found[kind] = []
        for seed in range(seeds):
            fault = drawn(kind, comm.size, seed)
            sha, lines, bad = trained(comm, fault)
            (asked,) = parse(fault)
            if kind == "nan":  # what one rank alone makes of it
                wanted, _, _ = trained(SerialComm(), fault.replace(f"rank={asked.rank}", "rank=0"))
                naming, done = f"on rank {asked.rank}, first in", bad == asked.times
            else:
                wanted, done = calm, any("taken again" in line for line in lines)
                naming = f": rank {asked.rank} differs from"
            mine = {"fault": fault, "same": sha == wanted, "done": done, "lines": lines}
            mine["named"] = bool(lines) and all(naming in line for line in lines)
            everyone = comm.allgather_obj(mine)
            found[kind].append(
                {**mine, **{key: all(one[key] for one in everyone) for key in ("same", "named", "done")}}
            )
    if comm.rank == 0:
        out.write_text(json.dumps(found))


def trained(comm: Comm, fault: str) -> tuple[str, list[str], int]:
    """A training with a fault: SHA-256 of the weights, what was said, steps that were skipped."""
    import keras
    import numpy as np

    from tf_dist.config import Config
    from tf_dist.models.build import build
    from tf_dist.training.trainer import Trainer

    keras.utils.set_random_seed(1)
    model = build(Config(layers=1, width=16, heads=2, seq_len=8, vocab_size=17))
    trainer = Trainer(
        model,
        keras.optimizers.Adam(1e-2),
        comm,
        clip_norm=0.0,
        global_batch_size=16,
        micro_batch_size=2,
        seq_len=8,
        check_every=EVERY,
        on_mismatch="restore",
        autotune="off",
    )
    told = BufferingHandler(MOST_LINES)
    log = logging.getLogger("tf_dist")
    log.addHandler(told)  # and nothing on the console
    faults.arm(fault, comm.rank)
    trainer.fit(np.arange(5000) ** 2 % 17, steps=STEPS)
    faults.arm("", comm.rank)
    log.removeHandler(told)
    lines = [record.getMessage() for record in told.buffer]
    return trainer.check_equal(), lines, trainer.state.skipped.total


if __name__ == "__main__":
    on_ranks(int(sys.argv[1]), Path(sys.argv[2]))
