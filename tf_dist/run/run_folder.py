"""The folder of a run, which a resumed job finds again.

config.yaml        every option, resolved           status.json     state and progress, for scripts
metrics.jsonl      a line of numbers per log step   tokenizer.json  text <-> ids
checkpoints/       see tf_dist.checkpoint.store     logs/           output of each rank
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from tf_dist import faults, terminal, untrusted_files
from tf_dist.atomic_io import temporary_name, write_whole
from tf_dist.comm.runtime import console as output
from tf_dist.comm.runtime.consensus import on_root
from tf_dist.comm.runtime.log_handlers import show
from tf_dist.comm.transport.base import Comm
from tf_dist.config import Config
from tf_dist.errors import LaunchError
from tf_dist.ops.supervisor import new_folder
from tf_dist.progress import fitted
from tf_dist.run import run_lock
from tf_dist.run.background_writer import Background
from tf_dist.run.metrics_file import METRICS as METRICS
from tf_dist.run.metrics_file import is_no_number, keep_rows
from tf_dist.run.metrics_file import read_metrics as read_metrics
from tf_dist.run.status import correct
from tf_dist.untrusted_files import STATUS_LIMIT_BYTES

# Bytes of a rank's output before there is a folder that are kept for its log.
FOREWORD_BYTES = 1 << 20


class Foreword:
    """Output before there is a run folder, as a start that fails leaves none.

    Rank 0 prints it at once; that of other ranks (of a user's model, N times) goes to their logs only.

    Args:
        comm: all ranks.

    Attributes:
        run: the folder, once there is one.
    """

    def __init__(self, comm: Comm) -> None:
        self._comm, self._lines = comm, list[str]()
        self.run: RunFolder | None = None
        self._held: IO[bytes] | None = None
        show(lambda text: self.say(text))
        if comm.rank:
            sys.stdout.flush()
            self._held, self._stdout = tempfile.TemporaryFile(), os.dup(1)
            os.dup2(self._held.fileno(), 1)

    def say(self, text: str) -> None:
        """As `RunFolder.say`, with or without a folder."""
        if self.run is not None:
            self.run.say(text)
        elif self._comm.rank == 0:
            output.say(text)
            self._lines.append(text + "\n")

    def end(self, run: RunFolder) -> str:
        """Switch to a run folder; returns the beginning of this rank's log."""
        self.run = run
        if self._held is None:
            return "".join(self._lines)
        sys.stdout.flush()
        os.dup2(self._stdout, 1)
        os.close(self._stdout)
        with self._held as held:
            held.seek(0)
            return held.read(FOREWORD_BYTES).decode(errors="replace")


class RunFolder:
    """The files of one run. Rank 0 writes them; every rank has its own log.

    Calls queued in ``later`` write in a thread while training continues; all other output waits for them
    first, so that the order is kept.

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
        self._status_lock = threading.RLock()
        self._status: dict[str, Any] = {
            "state": "running", "step": 0, "ranks": comm.size, "val_loss": None, "weights_sha256": None,
            "failures": [], "exit_code": None, "bad_steps": 0,
        }  # fmt: skip

    def open(self, foreword: Foreword | None = None) -> None:
        """Create the folder, and redirect this rank's output to its log; a collective.

        Args:
            foreword: earlier output, for the logs.

        Raises:
            LaunchError: on every rank, if one cannot write the folder, or another job is at work in it.
        """
        self._all_can(self._make)
        on_root(self.comm, self._claim)
        self._all_can(lambda: run_lock.share(self.path))
        self._all_can(lambda: self._redirect(foreword))
        show(lambda text: self.say(text))
        faults.writes_below(self.path)

    def _claim(self) -> None:
        run_lock.claim(self.path)
        correct(self.path, ours=True)

    def _all_can(self, do: Callable[[], None]) -> None:
        """Call it on every rank; all raise the error of the first rank that failed."""
        problem = ""
        try:
            do()
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            problem = (
                f"cannot write the run folder {self.path}: {error.strerror}{where}. Choose another with "
                "--run-dir"
            )
        except LaunchError as error:
            problem = str(error)
        message = next(filter(None, self.comm.allgather_obj(problem)), None)
        if message:
            raise LaunchError(message)

    def _make(self) -> None:
        """Create the folder and its subfolders; none may be a link that leads elsewhere. Raises `OSError`."""
        for folder in (self.path / "logs", self.checkpoints):
            untrusted_files.check_folder(folder)
            folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(self.metrics):
            untrusted_files.opened(self.metrics, follow=False).close()
        probe = temporary_name(self.path / "writable")
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        probe.unlink()

    def _redirect(self, foreword: Foreword | None) -> None:
        """Redirect the output of ranks above 0 to their logs, by file descriptors, as C++ prints as well."""
        path = self.path / "logs" / f"rank-{self.comm.rank:04d}.log"
        log = untrusted_files.opened_to_append(path)
        if foreword is not None:
            untrusted_files.append(path, terminal.printable(foreword.end(self)).encode())
        if self.comm.rank:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            self._console = {stream: os.dup(stream) for stream in (1, 2)}
            os.dup2(log, 1)
            os.dup2(log, 2)
        os.close(log)

    def check_ours(self) -> None:
        """Check before a write that the folder is there, and that no other job has it; on rank 0.

        Raises:
            LaunchError: the job must end.
        """
        if self.comm.rank == 0:
            run_lock.check(self.path)

    def set_aside(self) -> None:
        """Move an earlier run's files to ``earlier-N/``; on rank 0."""
        names = ("checkpoints", "metrics.jsonl", "status.json", "config.yaml", "tokenizer.json")
        old = [self.path / name for name in names if os.path.lexists(self.path / name)]
        if not any(self.checkpoints.iterdir()):
            self.keep_whole_rows(-1, set_aside=True)
            return
        number = 1
        while os.path.lexists(self.path / f"earlier-{number}"):
            number += 1
        aside = self.path / f"earlier-{number}"
        aside.mkdir()
        for path in old:
            os.rename(path, aside / path.name)
        self.checkpoints.mkdir()
        self.say(f"the files of an earlier run are now in {aside}")

    def say(self, text: str, as_it_is: bool = False) -> None:
        """Print text on rank 0 and append it to its log; wrapped to fit the terminal, or ``as_it_is``."""
        if self.comm.rank:
            return
        self.later.drain()
        output.say(text if as_it_is else fitted(text))  # training continues without a reader (`| head`)
        if run_lock.is_ours(self.path):
            line = (terminal.printable(text) + "\n").encode()
            with contextlib.suppress(OSError):
                untrusted_files.append(self.path / "logs" / "rank-0000.log", line)

    def write(self, name: str, text: str) -> None:
        """Write a file of the run, whole; on rank 0.

        Raises:
            LaunchError: it cannot be written.
        """
        if self.comm.rank == 0:
            self.later.drain()
            self.check_ours()
            write_whole(self.path / name, text.encode(errors="backslashreplace"), LaunchError)

    def status(self, **changes: object) -> None:
        """Change values in ``status.json``."""
        with self._status_lock:
            self._status.update(changes)
            self.write("status.json", json.dumps(self._status, indent=1) + "\n")

    def stopping(self, code: int) -> None:
        """Record that a signal stops the job, which may be killed soon; in any thread, on rank 0."""
        with self._status_lock, contextlib.suppress(LaunchError):
            if self._status["state"] == "running":
                self._status.update(state="stopping", exit_code=code)
                text = json.dumps(self._status, indent=1) + "\n"
                run_lock.check(self.path)
                write_whole(self.path / "status.json", text.encode(), LaunchError)

    def failed(self, code: int, message: str) -> None:
        """Record in ``status.json`` that the job fails; may be called on any rank while it is failing."""
        with contextlib.suppress(Exception):  # the failure that is recorded matters more
            self.later.drain()
        with contextlib.suppress(Exception):
            if run_lock.is_ours(self.path):
                status = self._status_there()
                last_line = message.strip().splitlines()[-1][:500] if message.strip() else ""
                status["failures"].append(
                    {"rank": self.comm.rank, "message": last_line, "unix_time": time.time()}
                )
                status.update(state="failed", exit_code=code)
                path = self.path / "status.json"
                write_whole(path, (json.dumps(status, indent=1) + "\n").encode(), LaunchError)

    def _status_there(self) -> dict[str, Any]:
        """The contents of ``status.json`` if they are valid; otherwise ours."""
        with contextlib.suppress(OSError, ValueError):
            found = untrusted_files.read_json(self.path / "status.json", STATUS_LIMIT_BYTES)
            if isinstance(found, dict) and isinstance(found.get("failures"), list):
                return found
        return {**self._status, "failures": list(self._status["failures"])}

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a line to ``metrics.jsonl``, with every key of the contract; on rank 0.

        Raises:
            LaunchError: it cannot be written.
        """
        if self.comm.rank == 0:
            self.check_ours()
            finite = {key: None if is_no_number(value) else value for key, value in row.items()}
            line = {**dict.fromkeys(METRICS), **finite}
            try:
                untrusted_files.append(self.metrics, (json.dumps(line) + "\n").encode())
            except OSError as error:
                raise LaunchError(
                    f"cannot write {self.metrics}: {error.strerror}. Checkpoints are untouched. "
                    "Make room, and repeat the command with --run-dir to resume from the newest one"
                ) from error

    def drop_metrics_after(self, step: int, set_aside: bool = False) -> None:
        """Remove rows of steps that a resumed run will repeat; on rank 0. See `keep_whole_rows`."""
        if self.comm.rank == 0:
            self.keep_whole_rows(step, set_aside)

    def keep_whole_rows(self, step: int, set_aside: bool = False) -> bool:
        """Reduce ``metrics.jsonl`` to complete rows up to a step, each step once; on rank 0.

        Args:
            step: the last one.
            set_aside: keep other lines in ``left-metrics-*.jsonl``: they may be of another timeline.

        Returns:
            Whether a row of this very step is there.

        Raises:
            LaunchError: it cannot be read or written.
        """
        self.later.drain()
        self.check_ours()
        left = self.path / f"left-metrics-{secrets.token_hex(4)}.jsonl" if set_aside else None
        there, count = keep_rows(self.metrics, step, left)
        if left is not None and count:
            self.say(f"{count} lines of metrics.jsonl are now in {left.name}: this run takes other steps")
        return there

    def be_first(self, comm: Comm) -> None:
        """Continue with the living ranks; the first of them writes the files and prints."""
        self.comm = comm
        self._status["ranks"] = comm.size
        if comm.rank == 0 and not self._is_first:
            self.take_over()

    def take_over(self) -> None:
        """Become the rank that writes the files and prints on the terminal."""
        self._is_first = True
        run_lock.check(self.path)
        run_lock.claim(self.path)  # the lock is the job's; this updates who is named in it
        for ours, console in self._console.items():
            os.dup2(console, ours)


def check_folder(config: Config) -> None:
    """Fail early if `RunFolder.open` would fail later, after the data is prepared; nothing is written.

    Raises:
        LaunchError: the folder cannot be made or written, or another job is at work in it.
    """
    wanted = Path(config.run_dir or "runs")
    there = next(path for path in (wanted, *wanted.absolute().parents) if path.exists() or path.is_symlink())
    why = "" if os.access(there, os.W_OK | os.X_OK) else "no permission to write there"
    if why or not there.is_dir():
        why = why if there.is_dir() else f"{there} is no folder"
        raise LaunchError(f"cannot write the run folder {wanted}: {why}. Choose another with --run-dir")
    if (wanted / "checkpoints").is_dir() and config.run_dir:
        run_lock.claim(wanted)


def choose_folder(config: Config, comm: Comm) -> Path:
    """The requested run folder, or a new one under ``runs/``, the same on every rank; a collective.

    A new one is created at once, so that jobs that start in the same second have different ones.

    Raises:
        LaunchError: it cannot be created.
    """
    return Path(on_root(comm, lambda: str(_named(config.run_dir) if config.run_dir else _new(config.model))))


def _named(run_dir: str) -> Path:
    """The target of a link: ``runs/latest`` may point elsewhere a moment later."""
    path = Path(run_dir)
    with contextlib.suppress(OSError, RuntimeError):
        while path.is_symlink():
            path = Path(os.path.normpath(path.parent / path.readlink()))
    return path


def _new(model: str) -> Path:
    return new_folder(f"{time.strftime('%Y%m%d-%H%M%S')}-{model.replace(':', '.')}")


def point_latest_to(path: Path) -> None:
    """Point ``runs/latest`` to this run, if it is under ``runs/``."""
    if path.parent.name != "runs" or path.name == "latest":
        return
    temporary = temporary_name(path.parent / "latest")
    with contextlib.suppress(OSError):
        temporary.symlink_to(path.name)
        try:
            os.replace(temporary, path.parent / "latest")
        finally:
            temporary.unlink(missing_ok=True)
