"""Gossip: ranks train locally and average their weights with one peer at a time, without a server.

Pairwise averaging as in AD-PSGD (Lian et al. 2018), pushed as in GoSGD (Blot et al. 2016), so that no rank
waits: a rank sends half of its *share* and a copy of its weights to a peer, which mixes them in when it
next polls:

    sender     share <- share / 2,  sends (share, w)
    receiver   w <- (share w + share' w') / (share + share'),  share <- share + share'

Shares always add up to 1, and messages do not change the mean of all weights by shares. That mean is
validated and saved; then all ranks continue from it.

Legend: P parameters, R ranks, H steps between pushes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tf_dist.comm.transport.base import Pending
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.reduction_tree import one_each
from tf_dist.parallel.totals import GradientReplica
from tf_dist.strategies.base import Context, Setting, StepRequest, Traits, steps_between
from tf_dist.strategies.drift import Drifting
from tf_dist.strategies.waiting import check_worker, step_alone, unless_failed, wait_for, wait_until

SHARE_TAG, WEIGHTS_TAG = 707, 708
# Share value that marks a rank's last message before a synchronization.
LAST = -1.0


@dataclass
class _Neighbor:
    """A peer, and messages in flight from it and to it.

    share, weights: receive buffers of its next message. ended: whether it has sent its last one before the
    synchronization.
    """

    rank: int
    share: np.ndarray
    weights: np.ndarray
    coming: Pending | None = None
    rest: Pending | None = None
    sends: tuple[Pending, ...] = ()
    ended: bool = False


@dataclass(frozen=True)
class GossipOptions:
    """When ranks push. sync_every: H, local steps of a rank between pushes."""

    sync_every: int = steps_between(1)


class Gossip(Drifting):
    """Gossip: each rank periodically pushes its weights to a random peer.

    Attributes:
        share: of this rank in the mean.
        mixed: how often this rank has mixed in a peer's weights.
        seed: of the choice of peers.
    """

    name, Options = "gossip", GossipOptions
    traits = Traits(replicas_equal=False, global_losses=False, lockstep=False, sums_gradients=False)
    seed = 1

    def __init__(self, options: GossipOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        self.every: int = self.options.sync_every
        self.mixed = 0
        self._own, self._shares_lost = np.empty(0, np.float32), False

    def check(self, setting: Setting) -> None:
        """As in `Strategy`."""
        check_worker(self, setting)

    def setup(self, context: Context) -> None:
        """As in `Strategy`."""
        super().setup(context)
        self.comm, self.parameters = context.mesh.all, context.replica.parameters
        self.share = 1.0 / self.comm.size
        self._random = np.random.default_rng([self.seed, self.comm.rank])
        self._peers = self._all_others()

    def _all_others(self) -> list[_Neighbor]:
        others = [rank for rank in range(self.comm.size) if rank != self.comm.rank]
        return [_Neighbor(rank, np.empty(1), aligned_empty(self.parameters)) for rank in others]

    def describe(self) -> str:
        """As in `Strategy`."""
        steps = f"{self.every} step{'s' * (self.every > 1)}"
        return f"every {steps} of its own a rank gives its weights to another one, which mixes them in"

    def step(self, request: StepRequest) -> float:
        """Mix in messages that have arrived, take a local step, and push if it is due.

        Ranks agree on a stop when they synchronize.
        """
        terms, replica = request.gradients(), request.replica
        if self._together:
            self._start_drift()
        self._look(replica)
        norm = step_alone(terms, request.totals, request.clip_norm, replica)
        if self._peers and (request.step + 1) % self.every == 0:
            self._push(replica)
        return norm

    def _start_drift(self) -> None:
        self._part()
        self._shares_lost = False
        self.share, self._own = 1.0 / self.comm.size, np.empty(0, np.float32)

    def synchronize(self, replica: GradientReplica, mesh: Mesh) -> None:
        """Make all ranks continue from the mean of their weights; a collective, after all have settled."""
        if self._together:
            return
        shares = np.array([self.share])
        if self._shares_lost:  # with a failed rank, or in a message to it
            self.comm.allreduce(shares)
            shares = self.share / shares
        weights = self._own * np.float32(shares[0])
        total = self.comm.allreduce_terms([weights], one_each(self.comm.size), weights).array
        replica.write_weights(total)
        self._together = True

    def settle(self, replica: GradientReplica) -> None:
        """Receive all messages in flight; then this rank's weights are ready for synchronization."""
        if not self._together:
            self._drain(replica)
            self._own = aligned_empty(self.parameters)
            replica.read_weights(self._own)

    def regroup(self, micro_batches: range) -> None:
        """Continue without failed ranks, and with other micro-batches; all synchronize."""
        super().regroup(micro_batches)
        self._shares_lost = True
        self._together = not self._own.size  # no rank has taken a step yet
        self._peers = self._all_others()

    def sum_over_ranks(self, sums: np.ndarray) -> None:
        """As in `Strategy`."""
        self.comm.allreduce(sums)

    def _push(self, replica: GradientReplica) -> None:
        """Send half of the share to a peer that has received the previous push; to none if none has."""
        free = []
        for peer in list(self._peers):
            with unless_failed(self._peers, peer):
                free += [peer] if all(one.done() for one in peer.sends) else []
        if not free:
            return
        peer = free[self._random.integers(len(free))]
        self.share /= 2
        weights = aligned_empty(self.parameters)
        replica.read_weights(weights)
        head = np.array([self.share])
        with unless_failed(self._peers, peer):
            for one in peer.sends:
                one.wait()
            sent = self.comm.isend(head, peer.rank, SHARE_TAG)
            peer.sends = sent, self.comm.isend(weights, peer.rank, WEIGHTS_TAG)

    def _look(self, replica: GradientReplica) -> bool:
        """Mix in messages that have arrived; whether there were any."""
        came = False
        for peer in list(self._peers):
            with unless_failed(self._peers, peer):
                came |= self._receive(peer, replica)
        return came

    def _receive(self, peer: _Neighbor, replica: GradientReplica) -> bool:
        """Mix in a message from one peer; whether there was one."""
        came = False
        if peer.rest is None and not peer.ended and peer.coming is None:
            peer.coming = self.comm.irecv(peer.share, peer.rank, SHARE_TAG)
        if peer.coming is not None and peer.coming.done():
            peer.coming.wait()
            peer.coming, came = None, True
            peer.ended = peer.share[0] == LAST
            if not peer.ended:
                peer.rest = self.comm.irecv(peer.weights, peer.rank, WEIGHTS_TAG)
        if peer.rest is not None and peer.rest.done():
            peer.rest.wait()
            peer.rest, came = None, True
            self._mix(float(peer.share[0]), peer.weights, replica)
        return came

    def _mix(self, share: float, weights: np.ndarray, replica: GradientReplica) -> None:
        own = aligned_empty(self.parameters)
        replica.read_weights(own)
        self.share += share
        weights -= own
        weights *= np.float32(share / self.share)
        own += weights
        replica.write_weights(own)
        self.mixed += 1

    def _drain(self, replica: GradientReplica) -> None:
        """Receive all messages to this rank. The last message of each peer comes after all others of it."""
        for peer in list(self._peers):
            with unless_failed(self._peers, peer):
                peer.sends += (self.comm.isend(np.array([LAST]), peer.rank, SHARE_TAG),)

        def missing() -> list[int]:
            return [peer.rank for peer in self._peers if not peer.ended or peer.rest is not None]

        wait_until(lambda: not missing(), lambda: self._look(replica), missing)
        for peer in list(self._peers):
            with unless_failed(self._peers, peer):
                wait_for(peer.sends, peer.rank)
            peer.sends, peer.ended = (), False
