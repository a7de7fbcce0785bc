"""Launches workers over scripts, and begins again behind a script that ends or hangs its job."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parents[1]))

from launching import mpirun, session_members, sourced_environment
from verdict import CRASHED, DIFFERENT, HANG, INVALID, LATE, REFUSED, Verdict, compared

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
# Seconds that one script may take, on a busy machine.
HANGS_S = 240
# Refusals that a script may be given: all ranks run one script, in one sound installation.
OF_THE_SCRIPT = ("UsageError", "DataError")
# Scripts of one launch: graphs of many models are never quite freed.
AT_ONCE = 50


def environment():
    """Of a user, with this checkout's tf_dist."""
    # KERAS_BACKEND and the like of a test run that has started us stay.
    ours = {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow"}
    return sourced_environment() | ours


def end_job(process):
    """End a job, and whatever is left of its session."""
    for pid in [process.pid, *session_members(process.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()


class Runs:
    """Runs of scripts in a folder, where scripts, records and outputs of jobs stay.

    Args:
        folder: made if missing.
        python: what to start as ``*python SCRIPT``; a new interpreter for each process by default.
    """

    def __init__(self, folder, python=(sys.executable,)):
        self.folder, self._python = Path(folder), python
        self.folder.mkdir(parents=True, exist_ok=True)

    def plain(self, scripts):
        """Run scripts by plain Keras, in two processes at once; not again those that are as they were."""
        scripts = [script for script in scripts if not self._is_known(script)]
        halves = [half for half in (scripts[::2], scripts[1::2]) if half]
        started = [self._start(half, 0, f"plain-{n}") for n, half in enumerate(halves)]
        for process, log in started:
            if process.wait() != 0:
                raise RuntimeError(f"plain Keras ended with {process.returncode}:\n{log.read_text()[-3000:]}")

    def ranks(self, scripts, np_):
        """Run scripts on ``np_`` ranks, launching again after those that end their job."""
        left, n = list(scripts), 0
        while left:
            process, log = self._start(left[:AT_ONCE], np_, f"np{np_}-{n}")
            stuck = self._watch(process, left[:AT_ONCE], np_)
            done = [script for script in left[:AT_ONCE] if self._complete(script, np_)]
            left, n = [script for script in left if script not in done], n + 1
            if process.returncode != 0 or stuck:
                if left and not self._died(left[0], np_, stuck, log):
                    raise RuntimeError(f"no rank has begun:\n{log.read_text()[-3000:]}")
                left = left[1:]

    def _is_known(self, script):
        record = self.folder / "plain" / f"{script.stem}.plain.json"
        return record.exists() and record.stat().st_mtime > script.stat().st_mtime

    def verdicts(self, scripts, np_):
        """What is said about each script."""
        return {script.stem: self._verdict(script, np_) for script in scripts}

    def _place(self, np_):
        return self.folder / (f"np{np_}" if np_ else "plain")

    def _start(self, scripts, np_, name):
        place = self._place(np_)
        place.mkdir(exist_ok=True)
        launch = [mpirun() or "mpirun", "-np", str(np_)] if np_ else []
        command = [*launch, *map(str, self._python), str(WORKER), str(place), "ranks" if np_ else "plain"]
        log = self.folder / f"{name}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [*command, *(str(script) for script in scripts)],
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, log

    def _watch(self, process, scripts, np_):
        """Wait for a job; True where it stays in one script for too long, and is ended."""
        done, since = -1, time.monotonic()
        while process.poll() is None:
            now = sum(self._complete(script, np_) for script in scripts)
            if now != done:
                done, since = now, time.monotonic()
            if time.monotonic() - since > HANGS_S:
                end_job(process)
                return True
            time.sleep(0.05)
        end_job(process)
        return False

    def _records(self, script, np_):
        paths = [self._place(np_) / f"{script.stem}.{rank}.json" for rank in range(np_)]
        return [json.loads(path.read_text()) if path.exists() else None for path in paths]

    def _complete(self, script, np_):
        return all((self._place(np_) / f"{script.stem}.{rank}.json").exists() for rank in range(np_))

    def _died(self, script, np_, stuck, log):
        """Note the script that a job has died in; False where it had not begun."""
        text = log.read_text(errors="replace")
        if f"--- {script.stem}\n" not in text:
            return False
        said = text.partition(f"--- {script.stem}\n")[2]
        note = {"stuck": stuck or "does not come" in said or "do not come" in said, "said": said[-3000:]}
        (self._place(np_) / f"{script.stem}.died").write_text(json.dumps(note))
        return True

    def _verdict(self, script, np_):
        plain = json.loads((self.folder / "plain" / f"{script.stem}.plain.json").read_text())
        records = self._records(script, np_)
        died = self._place(np_) / f"{script.stem}.died"
        failed = [f"rank {r}: {one['message']}" for r, one in enumerate(records) if one and one["message"]]
        if died.exists():
            note = json.loads(died.read_text())
            word = HANG if note["stuck"] and not failed else CRASHED
            return Verdict(word, "; ".join(failed) or _last_words(note["said"]))
        if plain["status"] != "done":
            return Verdict(INVALID, plain["message"])
        statuses = {one["status"] for one in records}
        if "crashed" in statuses:
            return Verdict(CRASHED, "; ".join(failed))
        if statuses == {"refused"} and not all(one["message"].startswith(OF_THE_SCRIPT) for one in records):
            return Verdict(CRASHED, failed[0])
        if statuses == {"refused"}:
            steps = max(one["steps"] for one in records)
            return (
                Verdict(LATE, f"after {steps} steps: {failed[0]}") if steps else Verdict(REFUSED, failed[0])
            )
        if statuses != {"done"}:
            return Verdict(DIFFERENT, "refused by some ranks only: " + "; ".join(failed))
        arrays = [self._arrays(np_, f"{script.stem}.{rank}") for rank in range(np_)]
        return compared(arrays, self._arrays(0, f"{script.stem}.plain"), plain["by_value"])

    def _arrays(self, np_, stem):
        with np.load(self._place(np_) / f"{stem}.npz") as file:
            return {name.replace("|", "/"): file[name] for name in file.files}


def _last_words(text):
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "rror" in line or "rank" in line]
    return " / ".join((told or lines)[-3:])
