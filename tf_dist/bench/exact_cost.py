"""Overhead of bit-exact reduction and of the consistency check.

Trains three models, in turn a step whose gradients are summed in the order of the tree and one with MPI's
own `Allreduce`, in one job; then times the consistency check, and both sums alone, on buffers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import models, plots, runner

if TYPE_CHECKING:
    import numpy as np

    from tf_dist.comm.transport.base import Comm
    from tf_dist.comm.transport.reduction_order import Reduced, ReductionOrder

MODULE = "tf_dist.bench.exact_cost"
FOLDER = runner.FOLDER / "exact-cost"
RANKS = (2, 4)
DROPPED = 3
# Model, rows of a rank, and steps of each kind. Each rank computes two micro-batches.
STEPS: dict[str, tuple[dict[str, Any], int, int]] = {
    "GPT 0.81 M": (models.GPT_SMALL, 6, 40),
    "LSTM 1.08 M": (models.LSTM, 32, 20),
    "GPT 10.7 M": (models.GPT, 4, 10),
}
# Parameters of nanoGPT's recipe, of a small and of a middling model.
LENGTHS = (809_856, 4_200_000, 10_700_000)
SUMS = 30


def main() -> int:
    """Start the ranks and print what they measured."""
    jobs = []
    for ranks in RANKS:
        print(f"{ranks} ranks ...", flush=True)
        jobs.append(runner.measured(ranks, MODULE, folder=FOLDER))
    print(f"\n{steps_table(jobs)}\n\n{sums_table(jobs)}")
    path = runner.save("exact-cost", {"jobs": jobs})
    print(f"\nin {path}\nand {picture(jobs, path.with_suffix('.png'))}")
    return 0


def picture(jobs: list[dict[str, Any]], path: Path) -> Path:
    """The time of a step, or of a sum, in the order of the tree, as a multiple of that with MPI's order."""
    panels = []
    for job in jobs:
        ratios = {f"a step, {name}": found["tree"] / found["plain"] for name, found in job["steps"].items()}
        for found in job["sums"]:
            ratios[f"a sum of {4e-6 * found['parameters']:.1f} MB"] = found["tree"] / found["plain"]
        title = f"{runner.ranks_named(job['ranks'])} ranks"
        panels.append(plots.Bars(title, list(ratios), list(ratios.values()), [True] * len(ratios)))
    return plots.bars(path, "tree / Allreduce", panels)


def steps_table(jobs: list[dict[str, Any]]) -> str:
    """Whole training steps, and the consistency check."""
    head = ["a training step", "ranks", "Allreduce ms", "tree ms", "ratio", "check ms", "per step, %"]
    rows = [
        [
            *(name, runner.ranks_named(job["ranks"]), f"{found['plain']:.1f}", f"{found['tree']:.1f}"),
            *(f"{found['tree'] / found['plain']:.3f}", f"{found['check']:.2f}"),
            f"{100 * found['check_share']:.2f}",
        ]
        for job in jobs
        for name, found in job["steps"].items()
    ]
    return runner.table(head, rows)


def sums_table(jobs: list[dict[str, Any]]) -> str:
    """The sums alone."""
    head = ["a sum of MB", "ranks", "Allreduce ms", "tree ms", "ratio"]
    rows = [
        [
            *(f"{4e-6 * found['parameters']:.1f}", runner.ranks_named(job["ranks"])),
            *(f"{found['plain']:.2f}", f"{found['tree']:.2f}", f"{found['tree'] / found['plain']:.2f}"),
        ]
        for job in jobs
        for found in job["sums"]
    ]
    return runner.table(head, rows)


# On the ranks ------------------------------------------------------------------------------------


def main_on_ranks(out: Path) -> None:
    """Measure everything; rank 0 leaves the medians in a file."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    job = {
        "ranks": comm.size,
        "steps": {name: step_medians(comm, *sizes) for name, sizes in STEPS.items()},
        "sums": [sum_medians(comm, length) for length in LENGTHS],
    }
    if comm.rank == 0:
        out.write_text(json.dumps(job))


def plain_sum(comm: Comm) -> Any:
    """As `Comm.allreduce_terms`, but each rank adds its own terms, and MPI those of the ranks as it likes."""
    from tf_dist.comm.transport.reduction_order import Reduced

    def add(terms: list[np.ndarray], order: ReductionOrder, out: np.ndarray) -> Reduced:
        for term in terms[1:]:
            terms[0] += term
        if out is not terms[0]:
            out[:] = terms[0]
        comm.allreduce(out)
        return Reduced(out)

    return add


def step_medians(comm: Comm, sizes: dict[str, Any], rows: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a step with each sum and of the consistency check, and its default share."""
    from tf_dist.bench.systems import trainer_of

    trainer, sequences, sampler = trainer_of(comm, sizes, rows, micro_batches=2)
    tree, plain = comm.allreduce_terms, plain_sum(comm)

    def step(add: Any) -> None:
        comm.allreduce_terms = add  # type: ignore[method-assign]
        trainer.train_step(sequences, sampler)

    works = {
        "plain": lambda: step(plain),
        "tree": lambda: step(tree),
        "check": lambda: trainer.consistency_check.compare(trainer.step),
    }
    found = runner.interleaved(comm, works, DROPPED + steps, DROPPED)
    comm.allreduce_terms = tree  # type: ignore[method-assign]
    return found | {"check_share": found["check"] / trainer.consistency_check.every / found["tree"]}


def sum_medians(comm: Comm, length: int) -> dict[str, float]:
    """Median milliseconds of each sum of ``length`` float32, one term a rank."""
    from tf_dist.parallel.flat_buffer import aligned_empty
    from tf_dist.parallel.reduction_tree import one_each

    made = one_each(comm.size)
    array = aligned_empty(length)
    array.fill(0.0)
    sums = {"plain": plain_sum(comm), "tree": comm.allreduce_terms}
    works = {name: (lambda add=add: add([array], made, array)) for name, add in sums.items()}
    return {"parameters": length, **runner.interleaved(comm, works, DROPPED + SUMS, DROPPED)}


if __name__ == "__main__":
    main_on_ranks(Path(sys.argv[1]))
