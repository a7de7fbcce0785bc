"""Gossip: ranks train by themselves and mix their weights with those of one other, without a master.

Pairwise averaging as in AD-PSGD (Lian et al. 2018), pushed as in GoSGD (Blot et al. 2016), so that nobody
waits: a rank gives half of its *share* and a copy of its weights to another one, which mixes them in when it
next looks:

    sender     share <- share / 2,  sends (share, w)
    receiver   w <- (share w + share' w') / (share + share'),  share <- share + share'

Shares always add up to 1, and the mean of all weights by shares is changed by no message. That mean is what
is validated and saved; then all go on from there.

Legend: P parameters, R ranks, H steps between pushes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tf_dist.comm.base import Pending
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.totals import Replica
from tf_dist.parallel.tree import one_each
from tf_dist.strategies.base import Context, Setting, StepRequest, Traits, steps_between
from tf_dist.strategies.drift import Drifting
from tf_dist.strategies.waiting import check_worker, step_alone, unless_dead, wait_for, wait_until

SHARE_TAG, WEIGHTS_TAG = 707, 708
# A share that says: this was my last message before all meet.
LAST = -1.0


@dataclass
class _Peer:
    """Another rank, and what is under way from it and to it.

    share, weights: where its next message comes. ended: whether it has sent its last one before all meet.
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
    """When ranks push. sync_every: H, steps that a rank takes by itself between pushes."""

    sync_every: int = steps_between(1)


class Gossip(Drifting):
    """Gossip: each rank now and then gives its weights to another one.

    Attributes:
        share: of this rank in the mean.
        mixed: how often this rank has mixed in somebody's weights.
        seed: of the choice of partners.
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

    def _all_others(self) -> list[_Peer]:
        others = [rank for rank in range(self.comm.size) if rank != self.comm.rank]
        return [_Peer(rank, np.empty(1), aligned_empty(self.parameters)) for rank in others]

    def describe(self) -> str:
        """As in `Strategy`."""
        steps = f"{self.every} step{'s' * (self.every > 1)}"
        return f"every {steps} of its own a rank gives its weights to another one, which mixes them in"

    def step(self, request: StepRequest) -> float:
        """Mix in what has come, take a step of one's own, and push where it is time.

        A wish to stop is agreed upon when all meet.
        """
        terms, replica = request.gradients(), request.replica
        if self._together:
            self._depart()
        self._look(replica)
        norm = step_alone(terms, request.totals, request.clip_norm, replica)
        if self._peers and (request.step + 1) % self.every == 0:
            self._push(replica)
        return norm

    def _depart(self) -> None:
        self._part()
        self._shares_lost = False
        self.share, self._own = 1.0 / self.comm.size, np.empty(0, np.float32)

    def synchronize(self, replica: Replica, mesh: Mesh) -> None:
        """Let all ranks go on from the mean of their weights; a collective, after all have settled."""
        if self._together:
            return
        shares = np.array([self.share])
        if self._shares_lost:  # with whoever has died, or was sent them
            self.comm.allreduce(shares)
            shares = self.share / shares
        weights = self._own * np.float32(shares[0])
        total = self.comm.allreduce_terms([weights], one_each(self.comm.size), weights).array
        replica.write_weights(total)
        self._together = True

    def settle(self, replica: Replica) -> None:
        """Take all that is under way; afterwards this rank's own weights wait for the meeting."""
        if not self._together:
            self._drain(replica)
            self._own = aligned_empty(self.parameters)
            replica.read_weights(self._own)

    def regroup(self, micro_batches: range) -> None:
        """Go on without ranks that have died, and with other micro-batches; all meet again."""
        super().regroup(micro_batches)
        self._shares_lost = True
        self._together = not self._own.size  # nobody has taken a step yet
        self._peers = self._all_others()

    def sum_over_ranks(self, sums: np.ndarray) -> None:
        """As in `Strategy`."""
        self.comm.allreduce(sums)

    def _push(self, replica: Replica) -> None:
        """Give half of the share to a rank that has taken what it was sent before; to nobody if none has."""
        free = []
        for peer in list(self._peers):
            with unless_dead(self._peers, peer):
                free += [peer] if all(one.done() for one in peer.sends) else []
        if not free:
            return
        peer = free[self._random.integers(len(free))]
        self.share /= 2
        weights = aligned_empty(self.parameters)
        replica.read_weights(weights)
        head = np.array([self.share])
        with unless_dead(self._peers, peer):
            for one in peer.sends:
                one.wait()
            sent = self.comm.isend(head, peer.rank, SHARE_TAG)
            peer.sends = sent, self.comm.isend(weights, peer.rank, WEIGHTS_TAG)

    def _look(self, replica: Replica) -> bool:
        """Mix in what has come; whether there was anything."""
        came = False
        for peer in list(self._peers):
            with unless_dead(self._peers, peer):
                came |= self._hear(peer, replica)
        return came

    def _hear(self, peer: _Peer, replica: Replica) -> bool:
        """Mix in what has come from one rank; whether there was anything."""
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

    def _mix(self, share: float, weights: np.ndarray, replica: Replica) -> None:
        own = aligned_empty(self.parameters)
        replica.read_weights(own)
        self.share += share
        weights -= own
        weights *= np.float32(share / self.share)
        own += weights
        replica.write_weights(own)
        self.mixed += 1

    def _drain(self, replica: Replica) -> None:
        """Take all that was sent to this rank. The last message of each rank comes after all others of it."""
        for peer in list(self._peers):
            with unless_dead(self._peers, peer):
                peer.sends += (self.comm.isend(np.array([LAST]), peer.rank, SHARE_TAG),)

        def missing() -> list[int]:
            return [peer.rank for peer in self._peers if not peer.ended or peer.rest is not None]

        wait_until(lambda: not missing(), lambda: self._look(replica), missing)
        for peer in list(self._peers):
            with unless_dead(self._peers, peer):
                wait_for(peer.sends, peer.rank)
            peer.sends, peer.ended = (), False
