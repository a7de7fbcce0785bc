"""`Background`: work done in a thread, such as writing a log to a slow disk."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError

# The end of a run waits no longer than this for a log.
DRAIN_LIMIT_S = 30.0


class Background:
    """Runs calls one after another, in a thread that starts with the first."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._thread: threading.Thread | None = None
        self._last: Future[None] | None = None
        self._error: BaseException | None = None

    def __call__(self, work: Callable[[], None]) -> None:
        """Queue ``work``.

        Raises:
            Exception: the first error of earlier work, once.
        """
        self._raise_error()
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="log")
        self._last = self._pool.submit(self._do, work)

    def drain(self) -> None:
        """Wait until the queue is empty; returns at once in the thread itself.

        Raises:
            Exception: the first error of earlier work, once.
        """
        if self._last is None or threading.current_thread() is self._thread:
            return
        with contextlib.suppress(TimeoutError):
            self._last.result(DRAIN_LIMIT_S)
        self._raise_error()

    def _do(self, work: Callable[[], None]) -> None:
        self._thread = threading.current_thread()
        try:
            work()
        except BaseException as error:  # for the thread that queued it
            self._error = self._error or error

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
