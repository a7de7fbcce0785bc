"""`Prefetcher`: prepares the input of the next step while the current one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """A function of the step that computes its next value in advance, in a thread.

    A thread, not a process: it reads mapped files and copies rows, while the main thread is inside TensorFlow
    and has released the GIL. Steps may be requested in any order; only the one after the last is prefetched.

    Args:
        make: from a step, counted from 0, to its input; a function of the step alone.
    """

    def __init__(self, make: Callable[[int], Made]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="input")
        self._step = -1
        self._ready: Future[Made] | None = None

    def __call__(self, step: int) -> Made:
        """Return or raise the result of ``make(step)``; start to prefetch the next step."""
        if self._ready is not None and self._step == step:
            made = self._ready.result()
        else:
            made = self._make(step)
        self._step, self._ready = step + 1, self._thread.submit(self._make, step + 1)
        return made
