"""`tf-dist run`: restarts a job after failures from its newest valid checkpoint.

mpirun ends a job when one of its ranks dies. Whoever started it by ``python -m tf_dist run`` may be asleep.
The same command is started again, after a pause that doubles while nothing gets better, until it has come to
its end, or a person has to look at it. What would repeat itself is not tried again: wrong flags or data, a
gradient that is not finite, no checkpoint that can be used.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tf_dist.errors import (
    BackendMissing,
    CheckpointError,
    DataError,
    LaunchError,
    NumericError,
    SavedAndStopped,
    UsageError,
)
from tf_dist.untrusted_files import STATUS_LIMIT_BYTES, read_json

LOG = logging.getLogger(__name__)
# Exit codes of jobs that would end in the same way again.
HOPELESS = {
    kind.exit_code
    for kind in (UsageError, DataError, BackendMissing, NumericError, CheckpointError, LaunchError)
}
RUN_DIR = "--run-dir"
# Grace period before an mpirun that outlives its job is killed: it may wait forever for an unreachable host.
DEAF_S = 60.0
LOOK_EVERY_S = 1.0
# These mean that the job is to end, not to begin again.
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# What Open MPI's mpirun asks for: before it starts more ranks than cores, and before root starts any.
OVERSUBSCRIBE = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Patience(NamedTuple):
    """How often a job is started again. tries: in a row, with no step saved in between. The rest: seconds."""

    tries: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0

    def pause_s(self, failures: int) -> float:
        """Before the next start, after so many failures in a row."""
        return float(min(self.longest_pause_s, self.first_pause_s * 2 ** (failures - 1)))


USUAL = Patience()


class Restarts:
    """Starts a job until it is done.

    Args:
        command: makes that of the job, its first word a program; told whether this is a start after another.
        run_dir: where the job says how far it has come.
        patience: when to give up.

    Attributes:
        starts: so far.
    """

    def __init__(
        self, command: Callable[[bool], Sequence[str]], run_dir: Path, patience: Patience = USUAL
    ) -> None:
        self._command, self._run_dir, self._patience = command, run_dir, patience
        self._job: subprocess.Popen[bytes] | None = None
        self._told = 0
        self.starts = 0

    def run(self) -> int:
        """Start the job until it is done; its last exit code."""
        heard = [number for number in PASSED_ON if signal.getsignal(number) is not signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._pass_on) for number in heard}
        try:
            code = self._until_done()
            code = code if code >= 0 else 128 - code  # as shells count signals
            # Told before it could listen: it has died of what was passed on, not of what was sent.
            return 128 + self._told if self._told and code == 128 + signal.SIGUSR1 else code
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _until_done(self) -> int:
        failures, reached = 0, saved_step(self._run_dir)
        while True:
            code = self._once()
            if code == 0 or code in HOPELESS or self._told:
                return code
            now = saved_step(self._run_dir)
            failures, reached = (1 if now > reached else failures + 1), now
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            if failures >= self._patience.tries:
                LOG.error(
                    f"giving up: {failures} failures in a row without a new checkpoint, the last one with "
                    f"{how}. See status.json and logs/ in {self._run_dir}; the same command goes on"
                )
                return code
            pause_s = 0.0 if code == SavedAndStopped.exit_code else self._patience.pause_s(failures)
            LOG.warning(f"the job has ended with {how}; starting it again in {pause_s:g} s, from step {now}")
            self._wait(pause_s)
            if self._told:
                return SavedAndStopped.exit_code

    def _once(self) -> int:
        command = list(self._command(self.starts > 0))
        try:
            self._job = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,  # mpirun reads ahead: `while read` would lose its list to it
                env=launcher_environment(os.environ),
                process_group=0,  # Ctrl-C is for this process, which lets the job save
            )
        except OSError as error:
            raise LaunchError(f"cannot start {command[0]}: {error.strerror}. Give --mpirun PATH") from error
        self.starts += 1
        if self._told:  # while it was being started
            self._job.send_signal(signal.SIGUSR1)
        try:
            return self._ended(self._job)
        finally:
            self._job = None

    def _ended(self, job: subprocess.Popen[bytes]) -> int:
        """Wait for the end of a job; kill it where its ranks say that it has failed, and it lives on."""
        before, failed_since = _failure(self._run_dir), math.inf
        while True:
            try:
                return job.wait(LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            failed = _failure(self._run_dir)
            failed_since = min(failed_since, now) if failed and failed != before else math.inf
            if now - failed_since >= DEAF_S:
                LOG.error(
                    f"the job has failed, and its mpirun has not ended for {DEAF_S:g} s: it is killed. "
                    "Is a host out of reach?"
                )
                job.kill()

    def _wait(self, seconds: float) -> None:
        """Sleep, but not on when a signal came."""
        until = time.monotonic() + seconds
        while not self._told and time.monotonic() < until:
            time.sleep(min(0.1, max(0.0, until - time.monotonic())))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Let the job save and end; told again, let mpirun end it at once."""
        again, self._told = self._told and number != signal.SIGUSR1, self._told or number
        if self._job is not None:
            # mpirun passes on SIGUSR1, and kills its ranks a moment after SIGTERM and SIGINT.
            self._job.send_signal(signal.SIGTERM if again else signal.SIGUSR1)


def _failure(run_dir: Path) -> int:
    """When, in ns, the job in a run folder has said that it has failed; 0: it has not."""
    path = run_dir / "status.json"
    try:
        failed = read_json(path, STATUS_LIMIT_BYTES)["state"] == "failed"
        return path.stat().st_mtime_ns if failed else 0
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint in a run folder, sound or not; 0 where there is none."""
    names = [path.name.removeprefix("step-") for path in run_dir.glob("checkpoints/step-*")]
    return max((int(name) for name in names if name.isascii() and name.isdigit()), default=0)


def launcher_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which mpirun starts what it is told to, as an activated .venv is.

    Where ranks are more than cores Open MPI refuses to start them, and root, the usual user of a container,
    may start none. What is set already stays.
    """
    wanted = OVERSUBSCRIBE | (AS_ROOT if os.getuid() == 0 else {})
    return wanted | dict(environment)


def own_mpirun() -> str:
    """The mpirun beside this Python, which belongs to its mpi4py, or whichever is on the path."""
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else "mpirun"


def with_run_dir(words: Sequence[str]) -> tuple[list[str], Path]:
    """The words of a job, which name a run folder, and that folder: a new one where they did not.

    Without a folder of its own a job that is started again would begin anew.
    """
    for number, word in enumerate(words):
        if word.startswith(RUN_DIR + "="):
            return list(words), Path(word.partition("=")[2])
        if word == RUN_DIR and number + 1 < len(words):
            return list(words), Path(words[number + 1])
    made = new_folder(f"{time.strftime('%Y%m%d-%H%M%S')}-restarts")
    return [*words, RUN_DIR, str(made)], made


def new_folder(name: str) -> Path:
    """A new folder under ``runs/``, with a number behind its name where that is taken.

    Raises:
        LaunchError: it cannot be made.
    """
    path, number = Path("runs") / name, 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
                path = Path("runs") / f"{name}-{number}"
    except OSError as error:
        raise LaunchError(
            f"cannot make a run folder {path}: {error.strerror}. Choose another with --run-dir"
        ) from error
