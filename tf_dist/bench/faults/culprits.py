"""Campaign against one rank of a job: it raises, exits, crashes or stops, and no rank may hang.

    python scripts/bench.py faults culprits            # 50 jobs on 3 ranks, ten minutes
    python scripts/bench.py faults culprits seeds=5

Which rank, in which step, and whether before its micro-batches, among them or after the step, is drawn from
the seed; the faults take turns. Counted are jobs that have ended, with a failure, within the limit after the
fault, and named the rank.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from tf_dist.bench import runner
from tf_dist.ops.supervisor import own_mpirun

MODULE = "tf_dist.bench.faults.culprits"
FOLDER = runner.FOLDER / "faults"
RANKS, STEPS, SEEDS = 3, 12, 50
PHASES = ("before", "among", "after")
STALL_WARN_S, STALL_ABORT_S = 2.0, 5.0
# From the fault to the end of mpirun; of a rank that is stopped, after the others have lost patience.
LIMIT_S = 10.0
# A job that takes so long hangs. Until the fault it starts Python and TensorFlow three times.
HANGS_S = 180.0
MARK = "FAULT AT "


def _raise() -> NoReturn:
    raise RuntimeError("a fault was wanted here")


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, Callable[[], Any]] = {
    "exception": _raise,
    "sys.exit": lambda: sys.exit(3),
    "segmentation fault": lambda: ctypes.string_at(0),
    "SIGSTOP": _stop,
    "os._exit": lambda: os._exit(3),
}


class HangFault(NamedTuple):
    """What happens to which rank, and when."""

    name: str
    rank: int
    step: int
    phase: str


def drawn(seed: int) -> HangFault:
    """The fault of a seed."""
    chance = random.Random(f"culprits {seed}")  # noqa: S311 - nothing secret
    name = list(FAULTS)[seed % len(FAULTS)]
    return HangFault(name, chance.randrange(RANKS), chance.randrange(1, STEPS - 1), chance.choice(PHASES))


def main(seeds: int = SEEDS) -> list[dict[str, Any]]:
    """Run the jobs, one after another; what became of each."""
    return [_job(seed) for seed in range(seeds)]


def _job(seed: int) -> dict[str, Any]:
    fault, log = drawn(seed), FOLDER / f"culprit-{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [own_mpirun(), "-np", str(RANKS), sys.executable, "-m", MODULE, str(seed)]
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(HANGS_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its ranks go with it
            code = process.wait()
        ended = time.time()
    found = judged(fault, code, ended, log.read_text(errors="replace"))
    print(
        f"seed {seed}: {fault.name} of rank {fault.rank} {fault.phase} step {fault.step}: {found}", flush=True
    )
    return {"seed": seed, **fault._asdict(), **found}


def judged(fault: HangFault, code: int, ended: float, output: str) -> dict[str, Any]:
    """Whether a job has ended in time, and named the rank.

    Args:
        fault: what was done.
        code: of mpirun.
        ended: when it was over, unix time.
        output: of all ranks and mpirun.
    """
    at = re.search(rf"{MARK}([\d.]+)", output)
    if at is None:
        return {"sound": False, "why": "it never came to the fault", "code": code}
    seconds = ended - float(at[1])
    limit_s = LIMIT_S + STALL_ABORT_S * (fault.name == "SIGSTOP")
    # mpirun says `process rank 1`, or `[prterun-host-123@1,1]`.
    named = bool(re.search(rf"rank {fault.rank}\b|@\d+,{fault.rank}\]", output[at.end() :]))
    sound = code not in (0, -signal.SIGKILL) and seconds <= limit_s and named
    return {"sound": sound, "named": named, "seconds": round(seconds, 2), "code": code}


def sound(found: Sequence[dict[str, Any]]) -> bool:
    """Whether no rank was waited for, or not named."""
    return all(one["sound"] for one in found)


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line for each kind of fault."""
    rows = []
    for name in FAULTS:
        jobs = [one for one in found if one["name"] == name]
        took = [one["seconds"] for one in jobs if "seconds" in one] or [float("nan")]
        codes = ", ".join(map(str, sorted({one["code"] for one in jobs})))
        good = sum(one["sound"] for one in jobs)
        row = [name, f"{good} of {len(jobs)}", f"{statistics.median(took):.1f}", f"{max(took):.1f}", codes]
        rows.append(row)
    head = ["fault of one rank of 3", "ended and named", "median s", "worst s", "exit codes"]
    return runner.table(head, rows)


# On ranks -----------------------------------------------------------------------------------------


def on_ranks(seed: int) -> None:
    """Train, until the fault."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect(stall_warn=STALL_WARN_S, stall_abort=STALL_ABORT_S)
    import keras
    import numpy as np

    from tf_dist.config import Config
    from tf_dist.models.build import build
    from tf_dist.training.trainer import Trainer

    model = build(Config(layers=1, width=16, heads=2, seq_len=8, vocab_size=17))
    adam = keras.optimizers.Adam(1e-2)
    trainer = Trainer(model, adam, comm, clip_norm=0.0, global_batch_size=12, micro_batch_size=2, seq_len=8)
    fault = drawn(seed)

    def perhaps(phase: str) -> None:
        if (comm.rank, trainer.step, phase) == (fault.rank, fault.step, fault.phase):
            print(f"{MARK}{time.time()}", flush=True)
            FAULTS[fault.name]()

    replica: Any = trainer.replica
    gradients = replica.gradients

    def among(*arguments: Any) -> Any:
        perhaps("among")
        return gradients(*arguments)

    replica.gradients = among
    calls = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: perhaps("before"),
        on_train_batch_end=lambda batch, logs: perhaps("after"),
    )
    trainer.fit(np.arange(5000) ** 2 % 17, steps=STEPS, callbacks=[calls])


if __name__ == "__main__":
    on_ranks(int(sys.argv[1]))
