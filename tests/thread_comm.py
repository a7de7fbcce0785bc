"""Ranks as threads of one process: real collectives between them, without MPI."""

import queue
import threading

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.comm.transport.reduction_order import Reduced, add_in_order
from tf_dist.errors import TfDistError

LIMIT_S = 30.0


class ThreadComm(Comm):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank, size, board, meeting):
        super().__init__()
        self.rank, self.size = rank, size
        self._board, self._meeting = board, meeting
        # Of all ranks: messages on their way, by (from, to, tag). All find the one that the first one made.
        self._post = meeting.__dict__.setdefault("post", {})

    def _letters(self, source, to, tag):
        # One operation: two ranks that ask first at once must not make two queues, of which one is lost.
        return self._post.setdefault((source, to, tag), queue.Queue())

    def _everyone(self, value):
        self._board[self.rank] = value
        self._meeting.wait(LIMIT_S)
        everyone = list(self._board)
        self._meeting.wait(LIMIT_S)
        return everyone

    def _allreduce(self, array):
        array[:] = sum(self._everyone(array.copy()))

    def _allreduce_terms(self, terms, order, out):
        everyone = self._everyone([term.copy() for term in terms])
        assert tuple(len(theirs) for theirs in everyone) == order.counts
        out[:] = add_in_order([term.copy() for theirs in everyone for term in theirs], order.additions)
        return Reduced(out)

    def _reduce_terms(self, terms, order, out, root):
        total = np.empty_like(out)
        self._allreduce_terms(terms, order, total)
        if self.rank == root:
            out[:] = total
            return Reduced(out)
        return None

    def _broadcast(self, array, root):
        array[:] = self._everyone(array.copy())[root]

    def _gather(self, array, root):
        rows = np.stack(self._everyone(array.copy()))
        return rows if self.rank == root else None

    def _allgather(self, array, parts):
        for part, theirs in zip(parts, self._everyone(array.copy()), strict=True):
            array[part] = theirs[part]

    def _barrier(self):
        self._everyone(None)

    def _isend(self, array, to, tag):
        self._letters(self.rank, to, tag).put(array.copy())
        return Arrived()

    def _irecv(self, array, source, tag):
        return Expected(self._letters(source, self.rank, tag), array)

    def _allgather_bytes(self, raw):
        return self._everyone(raw)


class Arrived:
    """A message that has been sent."""

    def wait(self):
        pass

    def done(self):
        return True


class Expected:
    """A message that is to come; those of one rank are to be waited for in the order of their `irecv`."""

    def __init__(self, post, array):
        self._post, self._array = post, array

    def wait(self):
        message = self._post.get(timeout=LIMIT_S)
        assert message.dtype == self._array.dtype
        self._array[:] = message

    def done(self):
        return not self._post.empty()


def on_ranks(size, function, kind=ThreadComm):
    """What ``function(comm)`` returns or raises on each of ``size`` ranks."""
    board, meeting, outcomes = [None] * size, threading.Barrier(size), [None] * size

    def work(rank):
        try:
            outcomes[rank] = function(kind(rank, size, board, meeting))
        except Exception as error:
            outcomes[rank] = error
            if not isinstance(error, TfDistError):  # those are raised by all ranks alike
                meeting.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert not any(thread.is_alive() for thread in threads), "ranks wait for each other"
    return outcomes
