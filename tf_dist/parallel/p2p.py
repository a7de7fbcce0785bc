"""Activations and their gradients between pipeline stages, as nonblocking messages.

Each boundary between two chunks has its own tag in each direction; `tf_dist.parallel.pipeline_schedules`
explains why that suffices. Sends complete in the background; one receive per boundary is always pre-posted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tf_dist.comm.transport.base import TAGS, Comm, Pending
from tf_dist.errors import UsageError
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.pipeline_schedules import F, Message


@dataclass
class _Inbox:
    """Messages of one boundary. left: expected messages for which no receive is posted yet."""

    shape: tuple[int, ...]
    dtype: Any
    left: int
    ahead: tuple[np.ndarray, Pending] | None = None


class P2PChannels:
    """A rank's messages to and from adjacent stages.

    Args:
        comm: the ranks of the pipeline.
        chunks: of the pipeline; chunk c lies on rank c mod p.

    Attributes:
        waited_s: time spent waiting for messages so far.

    Raises:
        UsageError: on every rank: more boundaries than tags.
    """

    def __init__(self, comm: Comm, chunks: int) -> None:
        if 2 * chunks >= TAGS:
            raise UsageError(f"a pipeline has at most {TAGS // 2 - 1} stages, not {chunks}: use fewer")
        self._comm, self._chunks = comm, chunks
        self._inboxes: dict[Message, _Inbox] = {}
        self._sent: list[tuple[np.ndarray, Pending]] = []
        self.waited_s = 0.0

    def expect(self, message: Message, shape: Sequence[int], dtype: Any, count: int) -> None:
        """Expect ``count`` such messages; a receive is always posted for the next one.

        Args:
            message: its kind, and the chunk that sends it.
            shape: of the arrays.
            dtype: of NumPy, or of TensorFlow (with ``as_numpy_dtype``).
            count: number of messages.
        """
        inbox = _Inbox(tuple(shape), np.dtype(getattr(dtype, "as_numpy_dtype", dtype)), count)
        self._inboxes[message] = inbox
        self._post(message, inbox)

    def take(self, message: Message) -> np.ndarray:
        """Wait for the next message, and post the receive of the one after."""
        inbox = self._inboxes[message]
        assert inbox.ahead is not None, f"nobody sends {message} again"
        array, pending = inbox.ahead
        begun = time.perf_counter()
        pending.wait()
        self.waited_s += time.perf_counter() - begun
        self._post(message, inbox)
        return np.reshape(array.view(inbox.dtype), inbox.shape)

    def send(self, message: Message, array: np.ndarray) -> None:
        """Start a send; the array must not change, and is kept alive until it has left."""
        self._sent = [one for one in self._sent if not one[1].done()]
        to = message.chunk + (1 if message.kind == F else -1)
        raw = array.reshape(-1).view(np.uint8)
        self._sent.append((array, self._comm.isend(raw, to % self._comm.size, message.tag)))

    def settle(self) -> None:
        """Wait for all sends; the receivers need nothing more from this rank."""
        begun = time.perf_counter()
        for _, pending in self._sent:
            pending.wait()
        self._sent = []
        self.waited_s += time.perf_counter() - begun

    def _post(self, message: Message, inbox: _Inbox) -> None:
        inbox.ahead = None
        if inbox.left:
            inbox.left -= 1
            array = aligned_empty(prod(inbox.shape) * inbox.dtype.itemsize, np.uint8)
            source = message.chunk % self._comm.size
            inbox.ahead = array, self._comm.irecv(array, source, message.tag)
