"""`BoardSync`: exchanges status board slots between the first ranks of all nodes, as messages.

The watchdog threads send and receive, so this needs MPI_THREAD_MULTIPLE. Nothing waits for a message: until
one has left, the next is not sent. A node whose first rank is stopped appears silent to the other nodes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from tf_dist import processes
from tf_dist.comm.health.status_board import GONE, SLOT, StatusBoard
from tf_dist.comm.transport import ulfm

TAG = 9
SEND_EVERY_S = 1.0
# How long the end of a job waits for messages in flight.
SETTLE_S = 2.0
HEAD = np.dtype([("stacks_requested", np.int64), ("sent_at", np.float64)])


class BoardSync:
    """Synchronizes the status boards of all nodes, once a second; runs on the first rank of a node.

    Args:
        mpi: communicator of all ranks, used by nothing else.
        board: of this node.
        nodes: the ranks of each node.
    """

    def __init__(self, mpi: Any, board: StatusBoard, nodes: Sequence[Sequence[int]]) -> None:
        self._mpi, self._board, rank = mpi, board, mpi.Get_rank()
        self._ranks = {ranks[0]: list(ranks) for ranks in nodes}
        self._mine = self._ranks.pop(rank)
        self._sends: dict[int, tuple[Any, bytearray]] = {}
        self._sent_at, self._open = 0.0, True

    def exchange(self) -> None:
        """Send what is due, and receive what has arrived."""
        try:
            self._receive()
            if self._open and time.monotonic() - self._sent_at >= SEND_EVERY_S:
                self._send()
        except MPI.Exception as error:
            if not ulfm.is_loss(error, self._mpi):
                raise
            for rank in ulfm.dead(self._mpi):
                self._ranks.pop(rank, None)
                self._sends.pop(rank, None)
            self._mpi.Ack_failed()

    def settle(self) -> None:
        """Stop sending, and wait until sent messages have left: MPI is about to be finalized."""
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
        head = np.array((self._board.stacks_requested, time.monotonic()), HEAD)
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
        later_s = time.monotonic() - float(head["sent_at"])  # offset between the clocks of two nodes
        rows["beat_at"] += later_s
        rows["since"][rows["since"] > 0] += later_s
        self._board.slots[self._ranks[source]] = rows
        self._board.request_stacks(int(head["stacks_requested"]))


def nodes_of(mpi: Any, node: Any) -> list[list[int]]:
    """Return the ranks of each node, ascending; a collective.

    Args:
        mpi: communicator of all ranks.
        node: communicator of the ranks that share memory with this one.
    """
    first = np.array([mpi.Get_rank()], np.int64)
    node.Bcast(first)
    leaders = np.empty(mpi.Get_size(), np.int64)
    mpi.Allgather(first, leaders)
    return [[int(rank) for rank in np.flatnonzero(leaders == leader)] for leader in np.unique(leaders)]
