"""`Signals`: SIGTERM, Ctrl-C, SIGHUP or SIGUSR1 makes a job save and end; a second signal ends it at once.

Python's own handlers wait until the main thread is back in Python, which takes as long as a step, a
collective, or the compilation of a model. So the signal wakes a thread, which acts.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tf_dist.errors import SavedAndStopped

if TYPE_CHECKING:
    from tf_dist.comm.runtime.job_exit import JobExit

TO_END = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# The same signal may arrive twice: from a job system, and forwarded by mpirun.
ONE_S = 0.5
# How long others wait for rank 0 to report: a launcher signals all ranks, a user perhaps one.
FLOOR_S = 0.3


class Signals:
    """Handles stop signals of this process. Create it in the main thread, once.

    Until `finish` is called there is nothing to save, and the first signal ends the job with exit code 75.

    Args:
        ending: prints messages, and ends the job.
    """

    def __init__(self, ending: JobExit) -> None:
        self._ending, self._told_at = ending, 0.0
        self._finish: Callable[[str], None] | None = None
        self._heard, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for number in TO_END:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and `&` in a script
                signal.signal(number, _woken)
        threading.Thread(target=self._listen, name="tf_dist-signals", daemon=True).start()

    def finish(self, how: Callable[[str], None]) -> None:
        """Make the first signal call ``how`` with its name, in a thread: the job saves and ends."""
        self._finish = how

    def _listen(self) -> None:
        while raw := os.read(self._heard, 1):
            if raw[0] in TO_END:
                self._told(signal.Signals(raw[0]))

    def _told(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if not self._told_at:
            self._told_at = now
            if self._finish is not None:
                self._finish(number.name)
                return
            self._end(
                f"told to end ({number.name}) before the first step: there is nothing to save, and the same "
                "command begins again",
                SavedAndStopped.exit_code,
            )
        elif number != signal.SIGUSR1 and now - self._told_at > ONE_S:
            self._end(
                f"told to end again ({number.name}): not saved. The same command goes on from the newest "
                "checkpoint",
                128 + number,
            )

    def _end(self, message: str, code: int) -> None:
        if self._ending.rank:
            time.sleep(FLOOR_S)
        self._ending.end(message, code)


def _woken(number: int, frame: object) -> None:
    """The thread does the work; without a handler Python would not wake it."""
