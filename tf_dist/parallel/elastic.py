"""Elastic averaging: workers train by themselves, tied to a centre by springs (EASGD, Zhang et al. 2015).

Rank 0 keeps the centre c. After every H steps of its own a worker shows its weights, and both move towards
each other, whenever it comes; nobody waits for another worker:

    d = alpha (w - c);   w <- w - d;   c <- c + d

alpha is the elastic force. What is validated and saved is the centre; then all go on from there.

Legend: P parameters, H steps between exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tf_dist.comm.base import Comm, Pending
from tf_dist.comm.sums import Order
from tf_dist.parallel.alone import step_alone, unless_dead, wait_for, wait_until
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.updates import STOP, Replica, Totals

# Of messages to the master and back.
HEAD_TAG, WEIGHTS_TAG, REPLY_TAG = 704, 705, 706
# Of a worker's message: its step, and the losses and counts since its last one.
HEAD = 4


@dataclass
class _Peer:
    """A worker as the master sees it; step: up to which it has shown what it has."""

    rank: int
    head: np.ndarray
    weights: np.ndarray
    coming: tuple[Pending, Pending] | None = None
    reply: Pending | None = None
    step: int = 0


class Elastic:
    """The update of EASGD; an `Update` with a memory.

    Args:
        comm: all ranks.
        parameters: P.
        micro_batches: numbers of those of a step that are this rank's; the master's may be none.
        every: H.
        force: alpha.

    Attributes:
        step: optimizer steps taken so far, to be set before each.
        limit: the step after which all ranks meet, to be set before each step.
        together: whether all ranks hold the centre.
        state_together: whether their optimizers have the same state.
        exchanges: of the master, so far.
    """

    def __init__(self, comm: Comm, parameters: int, micro_batches: range, every: int, force: float) -> None:
        self.comm, self.parameters, self.micro_batches = comm, parameters, micro_batches
        self.every, self.force = every, np.float32(force)
        self.step = self.limit = self.exchanges = 0
        self.together = self.state_together = True
        self._centre = np.empty(0, np.float32)
        self._since = np.zeros(STOP)
        self._peers = self._all_workers()

    def _all_workers(self) -> list[_Peer]:
        """As the master sees them; a worker sees none."""
        workers = range(1, self.comm.size) if self.comm.rank == 0 else []
        return [
            _Peer(rank, np.empty(HEAD), aligned_empty(self.parameters), step=self.step) for rank in workers
        ]

    @property
    def said(self) -> str:
        """A line for people."""
        tied = f"a spring of {self.force:g} ties each worker to the centre"
        return f"{tied}, every {self.every} steps of its own"

    def __call__(
        self,
        terms: list[np.ndarray],
        order: Order,
        totals: Totals,
        clip_norm: float,
        replica: Replica,
        mesh: Mesh,
    ) -> float:
        """Take a step of one's own, and exchange where it is time.

        Arguments and errors are those of `tf_dist.parallel.alone.step_alone`; ``totals`` of the master take
        what it has been told. A wish to stop is agreed upon when all meet.
        """
        if self.together:
            self._depart(replica)
        self.step += 1
        norm = step_alone(terms, totals, clip_norm, replica)
        due = self.step % self.every == 0 or self.step == self.limit
        if self.comm.rank == 0:
            self._serve(due, totals, replica)
        else:
            self._since += totals.sum()[:STOP]
            if due:
                self._exchange(replica)
        return norm

    def _depart(self, replica: Replica) -> None:
        self.together = self.state_together = False
        if self.comm.rank == 0:
            self._centre = aligned_empty(self.parameters)
            replica.read_weights(self._centre)

    def meet(self, replica: Replica, mesh: Mesh) -> None:
        """Let all ranks go on from the centre; a collective, after all have exchanged at the limit."""
        if self.together:
            return
        centre = aligned_empty(self.parameters)
        if self.comm.rank == 0 and self._centre.size:
            centre = self._centre
        elif self.comm.rank == 0:  # nobody has taken a step yet
            replica.read_weights(centre)
        self.comm.broadcast(centre)
        replica.write_weights(centre)
        self.together = True

    def settle(self, replica: Replica) -> None:
        """Before a meeting nothing is under way: each step to the limit has waited for its exchange."""

    def regroup(self, micro_batches: range) -> None:
        """Go on without ranks that have died, and with other micro-batches; all meet again."""
        self.micro_batches, self.together = micro_batches, False
        self._peers = self._all_workers()

    def add_up(self, sums: np.ndarray) -> None:
        """Replace sums over a rank's steps by those of all ranks, which the master has been told."""
        self.comm.broadcast(sums)

    # A worker --------------------------------------------------------------------------------------

    def _exchange(self, replica: Replica) -> None:
        weights, moved = aligned_empty(self.parameters), aligned_empty(self.parameters)
        replica.read_weights(weights)
        head = np.array([self.step, *self._since])
        answer = self.comm.irecv(moved, 0, REPLY_TAG)
        sends = [self.comm.isend(head, 0, HEAD_TAG), self.comm.isend(weights, 0, WEIGHTS_TAG)]
        wait_for([*sends, answer], 0)
        weights -= moved
        replica.write_weights(weights)
        self._since[:] = 0.0

    # The master ------------------------------------------------------------------------------------

    def _serve(self, due: bool, totals: Totals, replica: Replica) -> None:
        """Answer those who have come; where it has nothing else to do, or all meet, until all have."""
        trains = len(self.micro_batches) > 0
        if due and trains:
            weights = aligned_empty(self.parameters)
            replica.read_weights(weights)
            weights -= self._pulled(weights)
            replica.write_weights(weights)

        def look() -> bool:
            came = False
            for peer in list(self._peers):
                # What a dead one has learnt since it came last is lost with it.
                with unless_dead(self._peers, peer):
                    self._listen(peer)
                    if peer.coming is not None and all(one.done() for one in peer.coming):
                        came = True
                        self._answer(peer, totals)
            return came

        if due and (not trains or self.step == self.limit):
            wait_until(lambda: not self._behind(), look, self._behind)
        else:
            look()

    def _behind(self) -> list[int]:
        return [peer.rank for peer in self._peers if peer.step < self.step]

    def _listen(self, peer: _Peer) -> None:
        """Let a worker's next message come, if there is one before all meet."""
        if peer.coming is None and peer.step < self.limit:
            head = self.comm.irecv(peer.head, peer.rank, HEAD_TAG)
            peer.coming = head, self.comm.irecv(peer.weights, peer.rank, WEIGHTS_TAG)

    def _answer(self, peer: _Peer, totals: Totals) -> None:
        assert peer.coming is not None
        for one in peer.coming:
            one.wait()
        peer.coming, peer.step = None, int(peer.head[0])
        totals.add(0, peer.head[1:])
        if peer.reply is not None:
            peer.reply.wait()
        peer.reply = self.comm.isend(self._pulled(peer.weights), peer.rank, REPLY_TAG)
        if peer.step == self.limit:
            peer.reply.wait()
        self.exchanges += 1

    def _pulled(self, weights: np.ndarray) -> np.ndarray:
        """Let the centre and some weights pull at each other: how far these are to move."""
        moved = weights - self._centre
        moved *= self.force
        self._centre += moved
        return moved
