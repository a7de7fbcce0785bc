"""`Post`: slots of the board as messages between nodes, from the first rank of each to those of all others.

Sent and received by the watchdog threads, so only where MPI may be called from any thread. A message is
never waited for: while one has not left, the next is not sent. A node whose first rank is stopped is, for the
others, one from which nothing is heard.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from tf_dist import processes
from tf_dist.comm import survive
from tf_dist.comm.slots import GONE, SLOT, Board

TAG = 9
SEND_EVERY_S = 1.0
# How long the end of a job waits for messages that are on their way.
SETTLE_S = 2.0
HEAD = np.dtype([("stacks_wanted", np.int64), ("sent_at", np.float64)])


class Post:
    """Keeps the boards of nodes alike, a second late; for the first rank of a node.

    Args:
        mpi: communicator of all ranks, for nobody else's use.
        board: of this node.
        nodes: the ranks of each node.
    """

    def __init__(self, mpi: Any, board: Board, nodes: Sequence[Sequence[int]]) -> None:
        self._mpi, self._board, rank = mpi, board, mpi.Get_rank()
        self._ranks = {ranks[0]: list(ranks) for ranks in nodes}
        self._mine = self._ranks.pop(rank)
        self._sends: dict[int, tuple[Any, bytearray]] = {}
        self._sent_at, self._open = 0.0, True

    def exchange(self) -> None:
        """Send what is due, and take what has come."""
        try:
            self._receive()
            if self._open and time.monotonic() - self._sent_at >= SEND_EVERY_S:
                self._send()
        except MPI.Exception as error:
            if not survive.is_loss(error, self._mpi):
                raise
            for rank in survive.dead(self._mpi):
                self._ranks.pop(rank, None)
                self._sends.pop(rank, None)
            self._mpi.Ack_failed()

    def settle(self) -> None:
        """Send no more, and see that what was sent has left: MPI is about to be finalized."""
        self._open = False
        deadline = time.monotonic() + SETTLE_S
        while any(not request.Test() for request, _ in list(self._sends.values())):
            if time.monotonic() > deadline:
                return
            time.sleep(0.01)

    def _send(self) -> None:
        self._sent_at = time.monotonic()
        mine = self._board.slots[self._mine].copy()
        for row in mine:
            state = processes.state_of(int(row["pid"]), int(row["started"]))
            row["process"] = state.encode() or GONE
        head = np.array((self._board.stacks_wanted, time.monotonic()), HEAD)
        raw = head.tobytes() + mine.tobytes()
        for other in self._ranks:
            if other in self._sends and not self._sends[other][0].Test():
                continue
            letter = bytearray(raw)
            self._sends[other] = self._mpi.Isend(letter, dest=other, tag=TAG), letter

    def _receive(self) -> None:
        status = MPI.Status()
        while self._mpi.Iprobe(MPI.ANY_SOURCE, TAG, status):
            raw = bytearray(status.Get_count(MPI.BYTE))
            self._mpi.Recv(raw, source=status.Get_source(), tag=TAG)
            self._take(status.Get_source(), raw)

    def _take(self, source: int, raw: bytearray) -> None:
        head = np.frombuffer(raw, HEAD, 1)[0]
        rows = np.frombuffer(raw, SLOT, -1, HEAD.itemsize).copy()
        later_s = time.monotonic() - float(head["sent_at"])  # between the clocks of two nodes
        rows["beat_at"] += later_s
        rows["since"][rows["since"] > 0] += later_s
        self._board.slots[self._ranks[source]] = rows
        self._board.want_stacks(int(head["stacks_wanted"]))


def nodes_of(mpi: Any, node: Any) -> list[list[int]]:
    """The ranks of each node, ascending; a collective.

    Args:
        mpi: communicator of all ranks.
        node: of those that share this one's memory.
    """
    first = np.array([mpi.Get_rank()], np.int64)
    node.Bcast(first)
    leaders = np.empty(mpi.Get_size(), np.int64)
    mpi.Allgather(first, leaders)
    return [[int(rank) for rank in np.flatnonzero(leaders == leader)] for leader in np.unique(leaders)]
