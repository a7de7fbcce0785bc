"""A run's folder: what a job leaves behind, and finds again when it is resumed.

config.yaml        every option, resolved           status.json     where it stands, for scripts
metrics.jsonl      a line of numbers per log step   tokenizer.json  text <-> ids
checkpoints/       see checkpoint.py                logs/           output of each rank
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tf_dist import faults
from tf_dist.comm.agree import on_root
from tf_dist.comm.base import Comm
from tf_dist.config import Config
from tf_dist.errors import LaunchError, TfDistError
from tf_dist.files import write_whole
from tf_dist.progress import fitted
from tf_dist.training.background import Background
from tf_dist.training.in_use import claim

METRICS = (
    "step", "epoch", "loss", "val_loss", "perplexity", "bits_per_byte", "learning_rate", "grad_norm",
    "tokens", "tokens_per_s", "step_s", "comm_s", "wait_s", "elapsed_s", "bad_steps",
)  # fmt: skip


class RunFolder:
    """The files of one run. Rank 0 writes them; every rank has its own log.

    What is given to ``later`` is written by a thread while training goes on; everything else that is written
    or said waits for it first, so that nothing comes out of order.

    Args:
        path: the folder.
        comm: all ranks; only rank 0 writes.
    """

    def __init__(self, path: Path, comm: Comm) -> None:
        self.path, self.comm, self._is_first = path, comm, comm.rank == 0
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.later = Background()
        self._console: dict[int, int] = {}
        self._status: dict[str, Any] = {
            "state": "running", "step": 0, "ranks": comm.size, "val_loss": None, "weights_sha256": None,
            "failures": [], "exit_code": None, "bad_steps": 0,
        }  # fmt: skip

    def open(self) -> None:
        """Make the folder, and send this rank's output to its log; a collective.

        Raises:
            LaunchError: the folder cannot be written, or another job is at work in it.
        """
        logs = self.path / "logs"
        try:
            logs.mkdir(parents=True, exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            probe = self.path / f".writable-{self.comm.rank}"
            probe.touch()
            probe.unlink()
            on_root(self.comm, lambda: claim(self.path))
            with open(logs / f"rank-{self.comm.rank:04d}.log", "a") as log:
                self._redirect_to(log.fileno())
            faults.writes_below(self.path)
        except OSError as error:
            raise LaunchError(
                f"cannot write the run folder {self.path}: {error.strerror}. Choose another with --run-dir"
            ) from error

    def _redirect_to(self, log: int) -> None:
        """Let ranks above 0 print to their log: the file descriptors, so that C++ is heard there as well."""
        if self.comm.rank:
            sys.stdout.flush()
            sys.stderr.flush()
            self._console = {stream: os.dup(stream) for stream in (1, 2)}
            os.dup2(log, 1)
            os.dup2(log, 2)

    def set_aside(self) -> None:
        """Move an earlier run's files to ``earlier-N/``, for nothing may be lost; on rank 0."""
        names = ("checkpoints", "metrics.jsonl", "status.json", "config.yaml", "tokenizer.json")
        old = [self.path / name for name in names if (self.path / name).exists()]
        if not any(self.checkpoints.iterdir()):
            return
        number = 1
        while (self.path / f"earlier-{number}").exists():
            number += 1
        aside = self.path / f"earlier-{number}"
        aside.mkdir()
        for path in old:
            os.rename(path, aside / path.name)
        self.checkpoints.mkdir()
        self.say(f"the files of an earlier run are now in {aside}")

    def say(self, text: str, as_it_is: bool = False) -> None:
        """Print a line, on rank 0, and keep it in its log; broken to fit the terminal, or ``as_it_is``."""
        if self.comm.rank:
            return
        self.later.drain()
        with contextlib.suppress(OSError):  # a closed pipe (`| head`) must not end the training
            print(text if as_it_is else fitted(text), flush=True)
        with contextlib.suppress(OSError), open(self.path / "logs" / "rank-0000.log", "a") as log:
            log.write(text + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a file of the run, whole; on rank 0.

        Raises:
            LaunchError: it cannot be written.
        """
        if self.comm.rank == 0:
            self.later.drain()
            write_whole(self.path / name, text.encode(), LaunchError)

    def status(self, **changes: Any) -> None:
        """Change what ``status.json`` says."""
        self._status.update(changes)
        self.write("status.json", json.dumps(self._status, indent=1) + "\n")

    def failed(self, code: int, message: str) -> None:
        """Note in ``status.json`` that the job ends badly; may be called on any rank, by its last breath."""
        path = self.path / "status.json"
        with contextlib.suppress(Exception):  # it has its own failure to tell of
            self.later.drain()
        with contextlib.suppress(OSError, ValueError, TfDistError):
            status = json.loads(path.read_text()) if path.exists() else dict(self._status)
            last_line = message.strip().splitlines()[-1][:500] if message.strip() else ""
            status["failures"].append(
                {"rank": self.comm.rank, "message": last_line, "unix_time": time.time()}
            )
            status.update(state="failed", exit_code=code)
            write_whole(path, (json.dumps(status, indent=1) + "\n").encode(), LaunchError)

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``, with every key of the contract; on rank 0.

        Raises:
            LaunchError: it cannot be written.
        """
        if self.comm.rank == 0:
            finite = {key: None if _is_no_number(value) else value for key, value in row.items()}
            line = {**dict.fromkeys(METRICS), **finite}
            try:
                with open(self.metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise LaunchError(
                    f"cannot write {self.metrics}: {error.strerror}. Checkpoints are untouched. "
                    "Make room, and start the same command again: it goes on from the newest one"
                ) from error

    def drop_metrics_after(self, step: int) -> None:
        """Forget lines of steps that a resumed run will take again; on rank 0."""
        if self.comm.rank == 0:
            self.keep_whole_rows(step)

    def keep_whole_rows(self, step: int) -> bool:
        """Drop what is half written, or of a later step; whether a row of this step is there. On rank 0."""
        self.later.drain()
        if not self.metrics.exists():
            return False
        kept = [row for row in read_metrics(self.metrics) if row["step"] <= step]
        self.write("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
        return bool(kept) and kept[-1]["step"] == step

    def be_first(self, comm: Comm) -> None:
        """Go on with those who live; whoever is the first of them is the one that others read."""
        self.comm = comm
        self._status["ranks"] = comm.size
        if comm.rank == 0 and not self._is_first:
            self.take_over()

    def take_over(self) -> None:
        """Be the rank that others read: what it prints is for the terminal from now on."""
        self._is_first = True
        with contextlib.suppress(LaunchError):  # the one that died may still be going
            claim(self.path)
        for ours, console in self._console.items():
            os.dup2(console, ours)


def _is_no_number(value: Any) -> bool:
    """Whether JSON has no word for it: a loss or a norm of steps that were skipped."""
    return isinstance(value, float) and not math.isfinite(value)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a half-written last line is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def choose_folder(config: Config, comm: Comm) -> Path:
    """The run folder that was asked for, or a new one under ``runs/``, the same on every rank."""
    name = config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.model.replace(':', '.')}"
    name = str(comm.broadcast_obj(name))
    path, number = Path(name), 1
    while not config.run_dir and comm.rank == 0 and path.exists():
        number += 1
        path = Path(f"{name}-{number}")
    return Path(comm.broadcast_obj(str(path)))


def point_latest_to(path: Path) -> None:
    """Let ``runs/latest`` name this run, where it lies under ``runs/``."""
    if path.parent.name != "runs":
        return
    link = path.parent / "latest"
    temporary = path.parent / f".latest-{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.symlink_to(path.name)
        os.replace(temporary, link)
