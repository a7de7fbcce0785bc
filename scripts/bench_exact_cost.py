"""What it costs that the number of ranks changes no bit, and that the ranks keep watch over each other.

Trains three models, in turn a step whose gradients are summed in the order of the tree and one with MPI's
own `Allreduce`, in one job; then times the sentinel's comparison, and both sums alone, on buffers.

Started by ``scripts/bench.py exact-cost``; it starts its own ranks.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tf_dist.comm.base import Comm
    from tf_dist.training.trainer import Trainer

HERE = Path(__file__).resolve()
FOLDER = Path("runs/bench/exact-cost")
RANKS = (2, 4)
DROPPED = 3
# Model, its size, rows of a rank, and steps of each kind. Each rank computes two micro-batches.
STEPS: dict[str, tuple[dict[str, Any], int, int]] = {
    "GPT 0.81 M": ({"model": "transformer", "layers": 4, "width": 128, "heads": 4, "seq_len": 64}, 6, 40),
    "LSTM 1.08 M": ({"model": "lstm", "layers": 2, "width": 256, "heads": 4, "seq_len": 64}, 32, 20),
    "GPT 10.7 M": ({"model": "transformer", "layers": 6, "width": 384, "heads": 6, "seq_len": 256}, 4, 10),
}
VOCABULARY = 65
# Parameters of nanoGPT's recipe, of a small and of a middling model.
LENGTHS = (809_856, 4_200_000, 10_700_000)
SUMS = 30


def main() -> int:
    """Start the ranks and print what they measured."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    found: dict[str, Any] = {"cores": os.cpu_count(), "python": platform.python_version(), "jobs": []}
    for ranks in RANKS:
        print(f"{ranks} ranks ...", flush=True)
        found["jobs"].append(measured(ranks))
    path.write_text(json.dumps(found, indent=1) + "\n")
    print_steps(found["jobs"])
    print_sums(found["jobs"])
    print(f"\nin {path}")
    return 0


def measured(ranks: int) -> dict[str, Any]:
    """What a job on some ranks leaves behind."""
    mpirun, out = str(Path(sys.executable).with_name("mpirun")), FOLDER / f"ranks-{ranks}.json"
    subprocess.run([mpirun, "-np", str(ranks), sys.executable, str(HERE), str(out)], check=True, timeout=1800)
    return dict(json.loads(out.read_text()))


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(out: Path) -> None:
    """Measure everything; rank 0 leaves the medians in a file."""
    from tf_dist.comm import launch, threads

    comm = launch.connect()
    threads.load_tensorflow()
    plain = plain_sums()
    job = {
        "ranks": comm.size,
        "steps": {name: step_medians(comm, plain, *sizes) for name, sizes in STEPS.items()},
        "sums": [sum_medians(comm, plain, length) for length in LENGTHS],
    }
    if comm.rank == 0:
        out.write_text(json.dumps(job))


def plain_sums() -> Comm:
    """A Comm that adds the terms of a rank, then lets MPI add those of the ranks in an order of its own."""
    import numpy as np

    from tf_dist.comm.base import Order
    from tf_dist.comm.mpi import MPIComm

    class PlainSums(MPIComm):
        def _allreduce_terms(self, terms: list[np.ndarray], order: Order, out: np.ndarray) -> None:
            for term in terms[1:]:
                terms[0] += term
            if out is not terms[0]:
                np.copyto(out, terms[0])
            self._allreduce(out)

    return PlainSums()


def step_medians(comm: Comm, plain: Comm, sizes: dict[str, Any], rows: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step with each sum and of the sentinel, and its share at the default."""
    trainer, tokens = trainer_of(comm, sizes, rows)
    sequences = trainer.sequences(tokens)
    sampler = trainer.sampler(sequences)
    taken: dict[str, list[float]] = {"plain": [], "tree": [], "sentinel": []}
    for _ in range(DROPPED + steps):
        for name, carrier in (("plain", plain), ("tree", comm)):
            trainer.comm = carrier
            taken[name].append(slowest(comm, lambda: trainer.train_step(sequences, sampler)))
        taken["sentinel"].append(slowest(comm, lambda: trainer.sentinel.compare(trainer.step)))
    found = {f"{name}_ms": statistics.median(times[DROPPED:]) for name, times in taken.items()}
    found["sentinel_share"] = found["sentinel_ms"] / trainer.sentinel.every / found["tree_ms"]
    return found


def trainer_of(comm: Comm, sizes: dict[str, Any], rows: int) -> tuple[Trainer, Any]:
    """A trainer with two micro-batches for each rank, and tokens for one epoch of a few steps."""
    import keras
    import numpy as np

    from tf_dist.config import Config
    from tf_dist.models.build import build
    from tf_dist.training.trainer import Trainer

    keras.utils.set_random_seed(1)
    model = build(Config(vocab_size=VOCABULARY, **sizes))
    batch = rows * comm.size
    trainer = Trainer(
        model,
        keras.optimizers.AdamW(1e-4),
        comm,
        global_batch_size=batch,
        micro_batch_size=rows // 2,
        seq_len=sizes["seq_len"],
        clip_norm=1.0,
    )
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 4 * batch * sizes["seq_len"] + 1)
    return trainer, tokens.astype(np.uint16)


def sum_medians(comm: Comm, plain: Comm, length: int) -> dict[str, float]:
    """Median milliseconds of each sum of ``length`` float32, one term a rank."""
    from tf_dist.parallel.flat import aligned_empty
    from tf_dist.parallel.tree import order

    made = order(range(comm.size), [range(rank, rank + 1) for rank in range(comm.size)])
    array = aligned_empty(length)
    taken: dict[str, list[float]] = {"plain": [], "tree": []}
    for _ in range(DROPPED + SUMS):
        for name, carrier in (("plain", plain), ("tree", comm)):
            array.fill(1.0)
            taken[name].append(slowest(comm, lambda c=carrier: c.allreduce_terms([array], made, array)))
    medians = {f"{name}_ms": statistics.median(times[DROPPED:]) for name, times in taken.items()}
    return {"parameters": length, **medians}


def slowest(comm: Comm, work: Any) -> float:
    """Milliseconds that the slowest rank takes."""
    comm.barrier()
    begun = time.perf_counter()
    work()
    return 1e3 * float(max(comm.allgather_obj(time.perf_counter() - begun)))


# What is shown -----------------------------------------------------------------------------------


def print_steps(jobs: list[dict[str, Any]]) -> None:
    """Whole training steps, and the sentinel."""
    print(f"\n{'ranks':>5} {'a training step':15} {'Allreduce ms':>13} {'tree ms':>8} {'ratio':>6}", end="")
    print(f" {'sentinel ms':>12} {'of a step at the default':>25}")
    for job in jobs:
        for name, found in job["steps"].items():
            ratio = found["tree_ms"] / found["plain_ms"]
            print(
                f"{ranks_of(job):>5} {name:15} {found['plain_ms']:>13.1f} {found['tree_ms']:>8.1f}"
                f" {ratio:>6.3f} {found['sentinel_ms']:>12.2f} {100 * found['sentinel_share']:>24.2f}%"
            )


def print_sums(jobs: list[dict[str, Any]]) -> None:
    """The sums alone."""
    print(f"\n{'ranks':>5} {'a sum of MB':15} {'Allreduce ms':>13} {'tree ms':>8} {'ratio':>6}")
    for job in jobs:
        for found in job["sums"]:
            ratio = found["tree_ms"] / found["plain_ms"]
            print(
                f"{ranks_of(job):>5} {4e-6 * found['parameters']:<15.1f} {found['plain_ms']:>13.2f} "
                f"{found['tree_ms']:>8.2f} {ratio:>6.2f}"
            )


def ranks_of(job: dict[str, Any]) -> str:
    """The number of ranks, marked where they are more than cores."""
    return f"{job['ranks']}{'*' * (job['ranks'] > (os.cpu_count() or 1))}"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(main())
    main_on_ranks(Path(sys.argv[1]))
