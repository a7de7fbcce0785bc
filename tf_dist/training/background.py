"""`Background`: work that nobody waits for, such as writing a log to a slow disk."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError

# A log that takes longer than this does not hold up the end of a run.
DRAIN_LIMIT_S = 30.0


class Background:
    """Calls, one after the other, in a thread that is begun with the first."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None
        self._last: Future[None] | None = None
        self._error: BaseException | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Do ``work`` soon, after all that was given before.

        Raises:
            Exception: what earlier work raised, once.
        """
        self._raise_what_was_raised()
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="log")
        self._last = self._pool.submit(self._do, work)

    def drain(self) -> None:
        """Return when all is done that was given so far; at once in the thread that does it.

        Raises:
            Exception: what earlier work raised, once.
        """
        if self._last is None or threading.current_thread() is self._thread:
            return
        with contextlib.suppress(TimeoutError):
            self._last.result(DRAIN_LIMIT_S)
        self._raise_what_was_raised()

    def _do(self, work: Callable[[], None]) -> None:
        self._thread = threading.current_thread()
        try:
            work()
        except BaseException as error:  # for the thread that gave it
            self._error = self._error or error

    def _raise_what_was_raised(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
