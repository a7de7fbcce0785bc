"""Campaign against whole ``tf-dist train`` jobs: kills from outside, resumes on other numbers of ranks.

    tf-dist bench faults restarts            # 50 jobs on 2 ranks, started again by `tf_dist run`
    tf-dist bench faults resume              # stopped on 1 to 4 ranks, gone on with on 1 to 4
    tf-dist bench faults others              # ZeRO, a master and grids under ULFM
    tf-dist bench faults hosts               # two emulated hosts of two ranks each, under ULFM
    tf-dist bench faults goodput             # four minutes on 4 ranks, one kill a minute

Each must end with the weights of a job that nobody disturbed.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tf_dist.bench import runner
from tf_dist.ops.supervisor import own_mpirun

FOLDER = runner.FOLDER / "faults" / "jobs"
TRAIN = ("-m", "tf_dist", "train")
CLUSTER = [
    *(sys.executable, str(Path(__file__).resolve().parents[3] / "scripts" / "emulate_cluster.py")),
    *("--hosts", "2", "--slots", "2"),
]
ULFM = ("--with-ft", "ulfm")
STEPS = 60
# Small, so that a job is not much more than its start; a checkpoint and a validation now and then.
SMALL = (
    *("--layers", "2", "--width", "32", "--heads", "2", "--seq-len", "16", "--tokenizer", "byte"),
    *("--global-batch-size", "8", "--micro-batch-size", "1", "--threads-per-rank", "1"),
    *("--val-fraction", "0.001"),
    *("--steps", str(STEPS), "--save-every", "10", "--eval-every", "20", "--log-every", "1", "--keep", "9"),
)
# A model whose step takes some 0.1 s, saved every five seconds or so.
LONGER = (
    *("--layers", "2", "--width", "128", "--heads", "4", "--seq-len", "64", "--tokenizer", "byte"),
    *("--global-batch-size", "32", "--micro-batch-size", "4", "--threads-per-rank", "1"),
    *("--save-every", "50", "--eval-every", "200", "--log-every", "10", "--val-fraction", "0.001"),
)
LIMIT_S = 300.0
KILLS, KILL_EVERY_S = 3, 60.0
OTHERS = (
    ("--strategy", "zero"),
    ("--strategy", "zero", "--zero-stage", "3"),
    ("--strategy", "master"),
    ("--tensor-parallel", "2"),
    ("--strategy", "zero", "--replicate", "1"),
    ("--pipeline-parallel", "2", "--replicate", "1"),
)
# Sums over ranks that share a model are in another order: weights are near the calm job's, by rounding.
ROUNDED = {"--tensor-parallel", "--pipeline-parallel"}


class Ended(NamedTuple):
    """A job that is over. status: what it has left in ``status.json``."""

    code: int
    status: dict[str, Any]
    metrics: list[dict[str, Any]]
    seconds: float

    @property
    def weights(self) -> str | None:
        """The SHA-256 of its weights, where it has come to its end."""
        return self.status.get("weights_sha256") if self.status.get("state") == "done" else None


class FaultJob:
    """A job in a folder of its own.

    Args:
        command: starts it; ``--run-dir`` is added.
        run_dir: is made anew, unless the job is to go on.
    """

    def __init__(self, command: Sequence[str], run_dir: Path, go_on: bool = False) -> None:
        if not go_on:
            shutil.rmtree(run_dir, ignore_errors=True)
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir, self._begun = run_dir, time.monotonic()
        with open(run_dir / "job.log", "ab") as log:
            words = [*command, "--run-dir", str(run_dir)]
            self._process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics so far."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for(self, condition: Callable[[], bool]) -> bool:
        """Whether this has become true while the job was running."""
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def kill(self, rank: int) -> None:
        """Kill a rank, as it was numbered when the job began."""
        for pid in _pids(str(self.run_dir), str(rank)):
            os.kill(pid, signal.SIGKILL)

    def ask_to_stop(self) -> None:
        """Let it save, and end with 75."""
        for pid in _pids(str(self.run_dir)):
            os.kill(pid, signal.SIGUSR1)

    def wait(self) -> Ended:
        """Wait for its end, which is brought about when it takes too long."""
        try:
            code = self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        path = self.run_dir / "status.json"
        status = json.loads(path.read_text()) if path.exists() else {}
        return Ended(code, status, self.rows(), time.monotonic() - self._begun)


def _pids(run_dir: str, rank: str = r"\d+") -> Iterator[int]:
    """The processes of ranks of a job, found by what Open MPI and their command lines say."""
    wanted = re.compile(rf"(?:^|\0)OMPI_COMM_WORLD_RANK={rank}\0".encode())
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if run_dir.encode() in words and wanted.search((folder / "environ").read_bytes()):
                    yield int(folder.name)
            except OSError:
                continue  # it has ended meanwhile


def mpirun(ranks: int, *flags: str, ulfm: bool = False) -> list[str]:
    """The command line of a job of ``tf-dist train``."""
    return [own_mpirun(), *(ULFM if ulfm else ()), "-np", str(ranks), sys.executable, *TRAIN, *flags]


def restarted(seed: int, ranks: int = 2) -> Ended:
    """A job of `tf_dist run`, of which a random rank is killed at a random step."""
    chance = random.Random(f"restart {seed}")  # noqa: S311 - nothing secret
    step, rank, pause_s = chance.randrange(1, STEPS - 2), chance.randrange(ranks), 0.02 * chance.random()
    by = [sys.executable, "-m", "tf_dist", "run", "-np", str(ranks), "--", *TRAIN, *SMALL]
    job = FaultJob(by, FOLDER / f"restart-{seed}")
    if job.wait_for(lambda: len(job.rows()) >= step):
        time.sleep(pause_s)
        job.kill(rank)
    return job.wait()


def resumed(before: int, after: int) -> Ended:
    """A job that is stopped by a signal on some ranks, and goes on on others."""
    job = FaultJob(mpirun(before, *SMALL), FOLDER / f"resume-{before}-{after}")
    if job.wait_for(lambda: len(job.rows()) >= STEPS // 4):
        job.ask_to_stop()
    stopped = job.wait()
    if stopped.code != 75:  # it was over before the signal, or worse
        return stopped
    return FaultJob(mpirun(after, *SMALL), job.run_dir, go_on=True).wait()


def elsewhere(flags: Sequence[str], seed: int, ranks: int = 4, deaths: int = 2) -> Ended:
    """A job under ULFM of which some ranks are killed, and the others begin again in their processes."""
    chance = random.Random(f"{flags} {seed}")  # noqa: S311 - nothing secret
    steps = sorted(chance.sample(range(1, STEPS - 2), deaths))
    job = FaultJob(mpirun(ranks, *SMALL, *flags, ulfm=True), FOLDER / f"other-{'-'.join(flags)}-{seed}")
    for step, rank in zip(steps, chance.sample(range(ranks), deaths), strict=True):
        if job.wait_for(lambda step=step: len(job.rows()) >= step):  # type: ignore[misc]
            job.kill(rank)
    return job.wait()


def over_hosts(flags: Sequence[str], seed: int, whole_host: bool) -> Ended:
    """A job on two emulated hosts under ULFM, of which one rank is killed, or both of the second host."""
    chance = random.Random(f"hosts {flags} {seed}")  # noqa: S311 - nothing secret
    step, dead = chance.randrange(1, STEPS - 2), (2, 3) if whole_host else (chance.randrange(4),)
    command = [*CLUSTER, "--ulfm", "--", sys.executable, *TRAIN, *SMALL, *flags]
    job = FaultJob(command, FOLDER / f"hosts-{len(dead)}-{seed}")
    if job.wait_for(lambda: len(job.rows()) >= step):
        for rank in dead:
            job.kill(rank)
    return job.wait()


def goodput(ranks: int = 4) -> dict[str, Any]:
    """Kill a rank a minute, and see which share of the time went into steps that counted."""
    steps = ("--steps", "100000000")
    job = FaultJob(mpirun(ranks, *LONGER, *steps, ulfm=True), FOLDER / "goodput")
    if not job.wait_for(lambda: bool(job.rows())):
        raise SystemExit(f"error: no step was taken; see {job.run_dir}/job.log")
    begun, first = time.monotonic(), job.rows()[0]["step"]
    for rank in random.Random("goodput").sample(range(ranks), KILLS):  # noqa: S311 - nothing secret
        time.sleep(KILL_EVERY_S)
        job.kill(rank)
    time.sleep(KILL_EVERY_S)
    wall_s, rows = time.monotonic() - begun, job.rows()
    job.ask_to_stop()
    ended = job.wait()
    # What a step takes on as many ranks as were left where nobody died: a mean would have recoveries in it.
    lost = [one["step"] for one in ended.status.get("recoveries", [])]
    useful_s = 0.0
    for start, stop in zip([first, *lost], [*lost, rows[-1]["step"]], strict=True):
        here = [row for row in rows if start < row["step"] <= stop]
        useful_s += statistics.median([row["step_s"] for row in here] or [0.0]) * (stop - start)
    return {"kills": len(lost), "wall_s": wall_s, "useful_s": useful_s, "steps": rows[-1]["step"] - first}


# The campaign ----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of the table. good: how many of those tried have ended as they should."""

    fault: str
    good: int
    tried: int
    more: str = ""

    @property
    def sound(self) -> bool:
        """Whether all have."""
        return self.good == self.tried


def by_restart(seeds: int, calm: str) -> Iterator[Line]:
    """Jobs on 2 ranks that are started again."""
    ended = [restarted(seed) for seed in range(seeds)]
    took = f"{statistics.median(one.seconds for one in ended):.1f} s a job"
    yield Line("killed, by restart, np 2", sum(one.weights == calm for one in ended), seeds, took)


def by_resume(seeds: int, calm: str) -> Iterator[Line]:
    """Jobs that go on with as many, more or fewer ranks."""
    pairs = [(before, after) for before in range(1, 5) for after in range(1, 5)] * seeds
    bad = [f"{before} to {after}" for before, after in pairs if resumed(before, after).weights != calm]
    more = f"not: {', '.join(bad)}" if bad else ""
    yield Line("resumed, np 1-4 to np 1-4", len(pairs) - len(bad), len(pairs), more)


def by_other_updates(seeds: int, calm: str) -> Iterator[Line]:
    """Updates and grids that cannot finish a step in place: 2 of 4 ranks are killed."""
    for flags in OTHERS:
        ended = [elsewhere(flags, seed) for seed in range(seeds)]
        exact = not ROUNDED & set(flags)
        good = [one.weights == calm if exact else one.weights is not None for one in ended]
        yield Line(f"2 of 4 killed, {' '.join(flags)}", sum(good), seeds, _how_long(ended))


def _how_long(ended: Sequence[Ended]) -> str:
    """From the error to where all go on."""
    took = [ms["ms"] for one in ended for ms in one.status.get("recoveries", [])] or [float("nan")]
    return f"median {statistics.median(took):.0f} ms, worst {max(took):.0f} ms"


def by_hosts(seeds: int, calm: str) -> Iterator[Line]:
    """Jobs on two hosts: one of four ranks is killed, or all of a host."""
    check = subprocess.run([*CLUSTER, "--check"], capture_output=True, text=True)
    if check.returncode:
        yield Line(f"two hosts: {check.stderr.strip()}", 0, 0)
        return
    for flags, whole_host in (((), False), (("--strategy", "zero", "--replicate", "1"), True)):
        ended = [over_hosts(flags, seed, whole_host) for seed in range(seeds)]
        who = "a host's 2 of 4" if whole_host else "1 of 4 on 2 hosts"
        good = sum(one.weights == calm for one in ended)
        yield Line(f"{who} killed {' '.join(flags)}", good, seeds, _how_long(ended))


def by_the_minute(seeds: int, calm: str) -> Iterator[Line]:
    """Jobs of some minutes in which a rank is killed each minute."""
    for _ in range(seeds):
        found = goodput()
        share = found["useful_s"] / found["wall_s"]
        more = f"{100 * share:.1f} % of {found['wall_s']:.0f} s, {found['steps']} steps"
        yield Line("goodput, a kill a minute, np 4", found["kills"], KILLS, more)


PARTS = {
    "restarts": by_restart,
    "resume": by_resume,
    "others": by_other_updates,
    "hosts": by_hosts,
    "goodput": by_the_minute,
}
SEEDS = {"restarts": 50, "resume": 1, "others": 5, "hosts": 10, "goodput": 1}


def main(part: str, seeds: int) -> list[Line]:
    """Do one part; each of its lines."""
    calm = ""
    if part != "goodput":
        print(f"{part}: {seeds} of each ...", flush=True)
        calm = FaultJob(mpirun(2, *SMALL), FOLDER / "calm").wait().weights or "no calm run"
    return list(PARTS[part](seeds, calm))


def table(lines: Sequence[Line]) -> str:
    """A line for each fault."""
    rows = [[line.fault, f"{line.good} of {line.tried}", line.more] for line in lines]
    return runner.table(["jobs", "as they must be", ""], rows)
