"""EASGD: workers train locally, attracted by an elastic force to a center variable (Zhang et al. 2015).

Rank 0 holds the center variable c. After every H local steps a worker sends its weights, and both move
towards each other; workers do not wait for each other:

    d = alpha (w - c);   w <- w - d;   c <- c + d

alpha is the elastic force. The center is what is validated and saved; then all ranks continue from it.

Legend: P parameters, H steps between exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tf_dist.comm.transport.base import Pending
from tf_dist.errors import UsageError
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.mesh import DATA, Mesh
from tf_dist.parallel.totals import STOP, GradientReplica, Totals
from tf_dist.partition import share
from tf_dist.strategies.base import Context, Setting, StepRequest, Traits, option, steps_between
from tf_dist.strategies.drift import Drifting
from tf_dist.strategies.waiting import (
    check_worker,
    master_trains,
    step_alone,
    unless_failed,
    wait_for,
    wait_until,
)

# Tags of messages to the server and back.
HEAD_TAG, WEIGHTS_TAG, REPLY_TAG = 704, 705, 706
# Fields of a worker's message: its step, and the losses and counts since its last one.
HEAD = 4


@dataclass
class _WorkerState:
    """The server's state of a worker; step: up to which it has reported."""

    rank: int
    head: np.ndarray
    weights: np.ndarray
    coming: tuple[Pending, Pending] | None = None
    reply: Pending | None = None
    step: int = 0


@dataclass(frozen=True)
class EASGDOptions:
    """Options of EASGD.

    Attributes:
        sync_every: H, local steps of a worker between exchanges.
        elastic_force: alpha; 0: 0.9 / workers, as in Zhang et al. (2015).
        master_trains: "on": rank 0 trains like the others, and serves them between its steps.
    """

    sync_every: int = steps_between(4)
    elastic_force: float = option(
        0.0,
        "EASGD and gossip",
        "fraction of their distance by which easgd worker and center variable move towards each other; "
        "0: 0.9 / workers",
        least=0,
    )
    master_trains: str = master_trains()


class EASGD(Drifting):
    """Elastic averaging SGD.

    Attributes:
        limit: the step after which all ranks synchronize.
        exchanges: of the server, so far.
    """

    name, Options = "easgd", EASGDOptions
    traits = Traits(replicas_equal=False, global_losses=False, lockstep=False, sums_gradients=False)

    def __init__(self, options: EASGDOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        force = self.options.elastic_force
        if force > 1:
            raise UsageError(f"elastic_force is {force:g}: above 1 a spring throws; use 0.2")
        self.every: int = self.options.sync_every
        self.limit = self.exchanges = self._step = 0
        self._centre = np.empty(0, np.float32)
        self._since = np.zeros(STOP)

    def check(self, setting: Setting) -> None:
        """As in `Strategy`."""
        check_worker(self, setting)

    def assignment(self, count: int, mesh: Mesh) -> range:
        """Micro-batches of this rank; a server that does not train has none."""
        rank, size = mesh.at[DATA], mesh.shape[DATA]
        if self.options.master_trains == "off" and size > 1:
            return share(count, rank - 1, size - 1) if rank else range(0)
        return share(count, rank, size)

    def setup(self, context: Context) -> None:
        """As in `Strategy`."""
        super().setup(context)
        self.comm, self.parameters = context.mesh.all, context.replica.parameters
        workers = max(1, self.comm.size - (self.options.master_trains == "off"))
        self.force = np.float32(self.options.elastic_force or 0.9 / workers)
        self._peers = self._all_workers()

    def _all_workers(self) -> list[_WorkerState]:
        """Workers, on the server; empty on a worker."""
        workers = range(1, self.comm.size) if self.comm.rank == 0 else []
        return [
            _WorkerState(rank, np.empty(HEAD), aligned_empty(self.parameters), step=self._step)
            for rank in workers
        ]

    def describe(self) -> str:
        """As in `Strategy`."""
        tied = f"a spring of {self.force:g} ties each worker to the centre"
        return f"{tied}, every {self.every} steps of its own"

    def step(self, request: StepRequest) -> float:
        """Take a local step, and exchange if it is due.

        The server's totals include those that workers have sent. Ranks agree on a stop when they synchronize.
        """
        terms, totals, replica = request.gradients(), request.totals, request.replica
        self._step, self.limit = request.step, request.limit
        if self._together:
            self._start_drift(replica)
        self._step += 1
        norm = step_alone(terms, totals, request.clip_norm, replica)
        due = self._step % self.every == 0 or self._step == self.limit
        if self.comm.rank == 0:
            self._serve(due, totals, replica)
        else:
            self._since += totals.sum()[:STOP]
            if due:
                self._exchange(replica)
        return norm

    def _start_drift(self, replica: GradientReplica) -> None:
        self._part()
        if self.comm.rank == 0:
            self._centre = aligned_empty(self.parameters)
            replica.read_weights(self._centre)

    def synchronize(self, replica: GradientReplica, mesh: Mesh) -> None:
        """Make all ranks continue from the center; a collective, after all have exchanged at the limit."""
        if self._together:
            return
        centre = aligned_empty(self.parameters)
        if self.comm.rank == 0 and self._centre.size:
            centre = self._centre
        elif self.comm.rank == 0:  # no rank has taken a step yet
            replica.read_weights(centre)
        self.comm.broadcast(centre)
        replica.write_weights(centre)
        self._together = True

    def regroup(self, micro_batches: range) -> None:
        """Continue without failed ranks, and with other micro-batches; all synchronize."""
        super().regroup(micro_batches)
        self._together = False
        self._peers = self._all_workers()

    def sum_over_ranks(self, sums: np.ndarray) -> None:
        """Replace sums over a rank's steps by those of all ranks, as reported to the server."""
        self.comm.broadcast(sums)

    # A worker --------------------------------------------------------------------------------------

    def _exchange(self, replica: GradientReplica) -> None:
        weights, moved = aligned_empty(self.parameters), aligned_empty(self.parameters)
        replica.read_weights(weights)
        head = np.array([self._step, *self._since])
        answer = self.comm.irecv(moved, 0, REPLY_TAG)
        sends = [self.comm.isend(head, 0, HEAD_TAG), self.comm.isend(weights, 0, WEIGHTS_TAG)]
        wait_for([*sends, answer], 0)
        weights -= moved
        replica.write_weights(weights)
        self._since[:] = 0.0

    # The server ------------------------------------------------------------------------------------

    def _serve(self, due: bool, totals: Totals, replica: GradientReplica) -> None:
        """Serve workers that have arrived; if idle, or at a synchronization, until all have."""
        trains = len(self.context.micro_batches) > 0
        if due and trains:
            weights = aligned_empty(self.parameters)
            replica.read_weights(weights)
            weights -= self._elastic_step(weights)
            replica.write_weights(weights)

        def look() -> bool:
            came = False
            for peer in list(self._peers):
                # The progress of a failed worker since its last exchange is lost.
                with unless_failed(self._peers, peer):
                    self._post_receive(peer)
                    if peer.coming is not None and all(one.done() for one in peer.coming):
                        came = True
                        self._answer(peer, totals)
            return came

        if due and (not trains or self._step == self.limit):
            wait_until(lambda: not self._behind(), look, self._behind)
        else:
            look()

    def _behind(self) -> list[int]:
        return [peer.rank for peer in self._peers if peer.step < self._step]

    def _post_receive(self, peer: _WorkerState) -> None:
        """Post the receive of a worker's next message, if there is one before the synchronization."""
        if peer.coming is None and peer.step < self.limit:
            head = self.comm.irecv(peer.head, peer.rank, HEAD_TAG)
            peer.coming = head, self.comm.irecv(peer.weights, peer.rank, WEIGHTS_TAG)

    def _answer(self, peer: _WorkerState, totals: Totals) -> None:
        assert peer.coming is not None
        for one in peer.coming:
            one.wait()
        peer.coming, peer.step = None, int(peer.head[0])
        totals.add(0, peer.head[1:])
        if peer.reply is not None:
            peer.reply.wait()
        peer.reply = self.comm.isend(self._elastic_step(peer.weights), peer.rank, REPLY_TAG)
        if peer.step == self.limit:
            peer.reply.wait()
        self.exchanges += 1

    def _elastic_step(self, weights: np.ndarray) -> np.ndarray:
        """Apply the elastic force to center and weights: returns the change of the weights."""
        moved = weights - self._centre
        moved *= self.force
        self._centre += moved
        return moved
