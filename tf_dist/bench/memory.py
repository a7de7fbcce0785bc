"""Memory of a rank during training, against its formula.

    python scripts/bench.py memory              # GPT of 10.7 M and of 0.81 M parameters, on 1 and 2 ranks
    python scripts/bench.py memory gpt-0.81M

PSS counts a page that n processes share as one n-th in each, so that it adds up over ranks; RSS counts it in
all of them. Both are peaks over steps that are not the first ones (those compile): PSS is read every few
milliseconds from ``/proc/self/smaps_rollup``, the peak of RSS is the kernel's (VmHWM, reset before). The
baseline is what Python, MPI, TensorFlow and Keras take once a model of a few hundred parameters has been
trained; it is measured in the same job.

With P parameters, R ranks of a node, B rows, T tokens, L layers of width D, H heads, V tokens in the
vocabulary, in bytes:

    weights       4 P
    Adam          8 P               two moments
    gradients     8 P               of each variable, and all of them as one array
    sum           4 P               on one rank: the sum over its micro-batches
                  4 P (R + 1) / R   on more: a term of each rank and one place more, shared by all of them
    update        4 P               the scaled gradient
    activations   4 B T (L (16 D + H T) + 2 D + 3 V)

The last is what the backward pass needs, as Korthikanti et al. (2022) count it, in float32 and without
dropout: the inputs of both normalisations, of both projections around attention, queries, keys and values, of
the two large matrices and of the GELU between them; the weights of attention; and three times the logits.
Gradients, activations and what the update needs are not all there at one time, so the sum is more than a
program must have that frees in time; TensorFlow keeps copies and reserves beyond it.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import models, plots, runner

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.memory"
FOLDER = runner.FOLDER / "memory"
RANKS = (1, 2)
MEASURED = ("gpt-10.7M", "gpt-0.81M")
WARM_UP = 3
SAMPLED_EVERY_S = 0.02
MB = 1e-6
TERMS = ("baseline", "weights", "Adam", "gradients", "sum", "update", "activations")


def main(words: Sequence[str] = ()) -> int:
    """Start the jobs; print the terms and what was measured."""
    jobs = []
    for name in models.chosen(list(words) or MEASURED):
        if models.RECIPES[name].sizes["model"] != "transformer":
            raise SystemExit(f"error: bench-memory has no formula for {name}, only for Transformers")
        for ranks in RANKS:
            print(f"{name} on {ranks} rank{'s' * (ranks > 1)} ...", flush=True)
            jobs.append(runner.measured(ranks, MODULE, name, folder=FOLDER))
    print(f"\n{table(jobs)}")
    path = runner.save("memory", {"jobs": jobs})
    print(f"\nin {path}\nand {picture(jobs, path.with_suffix('.png'))}")
    return 0


def formula(sizes: dict[str, Any], parameters: int, ranks: int, rows: int) -> dict[str, float]:
    """Bytes of a rank beside the baseline, as the module says."""
    layers, width, heads, seq_len = (int(sizes[key]) for key in ("layers", "width", "heads", "seq_len"))
    each_token = layers * (16 * width + heads * seq_len) + 2 * width + 3 * models.VOCABULARY
    return {
        "weights": 4.0 * parameters,
        "Adam": 8.0 * parameters,
        "gradients": 8.0 * parameters,
        "sum": 4.0 * parameters * ((ranks + 1) / ranks if ranks > 1 else 1),
        "update": 4.0 * parameters,
        "activations": 4.0 * rows * seq_len * each_token,
    }


def terms_of(job: dict[str, Any]) -> dict[str, float]:
    """Bytes of each of TERMS, for the mean rank of a job."""
    recipe = models.RECIPES[job["name"]]
    found = formula(recipe.sizes, job["parameters"], job["ranks"], recipe.rows)
    return {"baseline": mean(job, "baseline_pss"), **found}


def mean(job: dict[str, Any], key: str) -> float:
    """The mean over ranks of a number of bytes."""
    return sum(float(rank[key]) for rank in job["of_ranks"]) / len(job["of_ranks"])


def table(jobs: list[dict[str, Any]]) -> str:
    """Each term in MB, what was measured, and the ratio last."""
    head = ["MB of a rank", "np", *TERMS, "formula", "peak PSS", "peak RSS", "with start", "PSS / formula"]
    rows = []
    for job in jobs:
        terms = terms_of(job)
        total, pss = sum(terms.values()), mean(job, "peak_pss")
        numbers = [*terms.values(), total, pss, mean(job, "peak_rss"), mean(job, "whole_rss")]
        cells = [f"{MB * number:.1f}" for number in numbers]
        rows.append([job["name"], runner.ranks_named(job["ranks"]), *cells, f"{pss / total:.2f}"])
    return runner.table(head, rows) + "\nwith start: peak RSS of the whole process, first steps included"


def picture(jobs: list[dict[str, Any]], path: Path) -> Path:
    """The terms of each job as one bar, and what was measured below it."""
    rows: dict[str, list[float]] = {}
    for job in jobs:
        name = f"{job['name']}, np {job['ranks']}"
        rows[f"{name}, formula"] = [MB * term for term in terms_of(job).values()] + [0.0]
        rows[f"{name}, peak PSS"] = [0.0] * len(TERMS) + [MB * mean(job, "peak_pss")]
    return plots.stacked(path, "MB of a rank", [*TERMS, "measured PSS"], rows)


# On the ranks ------------------------------------------------------------------------------------


def memory_now() -> dict[str, int]:
    """PSS and RSS of this process, in bytes."""
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        key, _, rest = line.partition(":")
        if key in ("Pss", "Rss"):
            found[key.lower()] = int(rest.split()[0]) << 10
    return found


def peak_rss() -> int:
    """The peak of RSS since the process began, or `forget_peak`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Let the kernel begin anew with the peak of RSS."""
    Path("/proc/self/clear_refs").write_text("5")


class Watch:
    """Reads PSS every few milliseconds, in a thread, while it is entered.

    A look takes a millisecond or more of a core, so that steps which are timed want fewer.
    """

    def __init__(self, every_s: float = SAMPLED_EVERY_S) -> None:
        self.peak_pss, self._every_s = 0, every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._over.is_set():
            self.peak_pss = max(self.peak_pss, memory_now()["pss"])
            self._over.wait(self._every_s)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def used_once(comm: Comm) -> dict[str, int]:
    """What this process takes when every room of TensorFlow that a step needs has been entered once."""
    from tf_dist.bench import systems

    trainer, sequences, sampler = systems.trainer_of(comm, models.TINY_GPT, 1, micro_batches=1)
    for _ in range(WARM_UP):
        trainer.train_step(sequences, sampler)
    comm.barrier()
    found = memory_now()
    comm.barrier()
    return found


def main_on_ranks(name: str, out: Path) -> None:
    """Train; every rank's peaks, gathered by rank 0."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    from tf_dist.bench import systems

    baseline = used_once(comm)
    sizes, rows, steps = models.RECIPES[name]
    trainer, sequences, sampler = systems.trainer_of(comm, sizes, rows, micro_batches=1)
    for _ in range(WARM_UP):
        trainer.train_step(sequences, sampler)
    whole = peak_rss()
    forget_peak()
    with Watch() as watch:
        for _ in range(steps):
            trainer.train_step(sequences, sampler)
    mine = {
        "baseline_pss": baseline["pss"],
        "baseline_rss": baseline["rss"],
        "peak_pss": watch.peak_pss,
        "peak_rss": peak_rss(),
        "whole_rss": max(whole, peak_rss()),
    }
    everyone = comm.allgather_obj(mine)
    if comm.rank == 0:
        found = {"name": name, "ranks": comm.size, "parameters": trainer.replica.parameters}
        out.write_text(json.dumps({**found, "of_ranks": everyone}))


if __name__ == "__main__":
    main_on_ranks(sys.argv[1], Path(sys.argv[2]))
