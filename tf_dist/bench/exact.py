"""Bit-exactness: whether the number of ranks changes a bit of the weights.

Trains {LSTM, Transformer} x {allreduce, master} x {plain, dropout and clipping, resumed from another
number of ranks} on 1, 2, 3, 4 and 8 ranks and compares the SHA-256 of the final weights with those of one
rank. Runs are those of ``tf-dist train``.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

from tf_dist.bench import plots, runner

MODULE = "tf_dist.bench.exact"
# Run as a program is, for what it is told and leaves behind; this room does not know it otherwise.
TRAIN = "tf_dist.cli.train"
FOLDER = runner.FOLDER / "exact"
RANKS = (1, 2, 3, 4, 8)
STEPS, HALF = 24, 12
MODELS = ("lstm", "transformer")
STRATEGIES = ("allreduce", "master")
REGIMES: dict[str, list[str]] = {
    "plain": ["--clip-norm", "0", "--dropout", "0"],
    "dropout, clipping": ["--clip-norm", "0.5", "--dropout", "0.2"],
}
RESUMED = "resumed elsewhere"
# 20 micro-batches of 3 rows: no number of ranks but 1, 2 and 4 has equal shares. Epochs are short, so that
# last batches are padded.
SIZES = [
    *("--data", "stdlib", "--max-bytes", "150000", "--tokenizer", "byte", "--seq-len", "32", "--layers", "2"),
    *("--width", "32", "--heads", "4", "--global-batch-size", "60", "--micro-batch-size", "3"),
    *("--steps", str(STEPS), "--save-every", str(HALF), "--eval-every", "0", "--progress", "none"),
    *("--threads-per-rank", "1", "--weight-decay", "0.1", "--warmup-steps", "5"),
]


def main() -> int:
    """Run everything; print the table. 0 where all hashes are equal."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for ranks in RANKS:
        start(ranks, "train", stamp)
    start(RANKS[0], "resume", stamp, str(RANKS[-1]))
    hashes = {
        run: {ranks: sha256(stamp, ranks, *run) for ranks in RANKS}
        for run in [(m, u, r) for m in MODELS for u in STRATEGIES for r in [*REGIMES, RESUMED]]
    }
    equal = print_hashes(hashes)
    named = {" / ".join(run): by_ranks for run, by_ranks in hashes.items()}
    path = runner.save("exact", {"hashes": named})
    print(f"\nin {path}\nand {picture(named, path.with_suffix('.png'))}")
    return 0 if equal else 1


def picture(hashes: dict[str, dict[int, str]], path: Path) -> Path:
    """A grid of hashes, a colour for each different one in a line."""
    rows = {run: [sha[:8] for sha in by_ranks.values()] for run, by_ranks in hashes.items()}
    columns = [f"np {ranks}" for ranks in next(iter(hashes.values()))]
    return plots.grid(path, "SHA-256 of the weights", columns, rows)


def start(ranks: int, *words: str) -> None:
    """One job of this module."""
    print(f"{words[0]} on {ranks} rank{'s' * (ranks > 1)} ...", flush=True)
    runner.launch(ranks, MODULE, *words, log=FOLDER / f"log-{ranks}-{words[0]}.txt")


def run_folder(stamp: str, ranks: int, model: str, strategy: str, regime: str) -> Path:
    """Where a run of the table is kept."""
    return FOLDER / stamp / f"{ranks}-{model}-{strategy}-{regime.replace(', ', '-').replace(' ', '-')}"


def sha256(stamp: str, ranks: int, *run: str) -> str:
    """The hash of a run's final weights, from its status."""
    status = json.loads((run_folder(stamp, ranks, *run) / "status.json").read_text())
    assert status["state"] == "done"
    return str(status["weights_sha256"])


# On the ranks ------------------------------------------------------------------------------------


def train_all(ranks: int, stamp: str) -> None:
    """All runs of one number of ranks, in one job: TensorFlow loads once."""
    for model in MODELS:
        for strategy in STRATEGIES:
            for regime, flags in REGIMES.items():
                train(stamp, ranks, model, strategy, regime, [*flags], "never")
    earlier = [other for other in RANKS if other < ranks]
    if earlier:
        resume_all(ranks, stamp, earlier[-1])


def resume_all(ranks: int, stamp: str, earlier: int) -> None:
    """Finish on these ranks what others had half done."""
    for model in MODELS:
        for strategy in STRATEGIES:
            regime = "dropout, clipping"
            half = run_folder(stamp, earlier, model, strategy, regime) / "checkpoints" / f"step-{HALF:08d}"
            train(stamp, ranks, model, strategy, RESUMED, REGIMES[regime], str(half))


def train(
    stamp: str, ranks: int, model: str, strategy: str, regime: str, flags: list[str], resume: str
) -> None:
    """One run of ``tf-dist train``."""
    folder = run_folder(stamp, ranks, model, strategy, regime)
    options = ["--model", model, "--strategy", strategy, "--resume", resume, "--run-dir", str(folder)]
    runpy.run_module(TRAIN)["main"]([*SIZES, *options, *flags])


# What is shown -----------------------------------------------------------------------------------


def print_hashes(hashes: dict[tuple[str, str, str], dict[int, str]]) -> bool:
    """The table of hashes, each compared with one rank's; whether all are equal."""
    wanted = {(m, r): hashes[(m, "allreduce", r)][1] for m in MODELS for r in REGIMES}
    wanted |= {(m, RESUMED): wanted[(m, "dropout, clipping")] for m in MODELS}
    rows, all_equal = [], True
    for (model, strategy, regime), by_ranks in hashes.items():
        equal = [found == wanted[(model, regime)] for found in by_ranks.values()]
        cells = [f"{sha[:8]}{' ' if ok else '!'}" for sha, ok in zip(by_ranks.values(), equal, strict=True)]
        rows.append([f"{model}, {strategy}, {regime}", *cells])
        all_equal = all_equal and all(equal)
    print("\n" + runner.table(["SHA-256 of the weights", *(f"np {ranks} " for ranks in RANKS)], rows))
    print("all equal to one rank's" if all_equal else "DIFFERENT from one rank's where marked !")
    return all_equal


def main_on_ranks(work: str, *words: str) -> None:
    """What `launch` starts on every rank."""
    ranks = int(os.environ["OMPI_COMM_WORLD_SIZE"])
    if work == "train":
        train_all(ranks, *words)
    else:
        resume_all(ranks, words[0], int(words[1]))


if __name__ == "__main__":
    main_on_ranks(*sys.argv[1:])
