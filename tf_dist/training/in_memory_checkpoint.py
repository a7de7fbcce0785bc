"""Peer (buddy) checkpoints: each rank keeps its part of all tensors in memory, and that of another rank.

What only one rank holds (a shard of the optimizer, layers, the state of a parameter server) then outlives it.
After a death the others restart (`tf_dist.training.restart`) not from the newest checkpoint, but from the
last copies, and read no disk. This is the double in-memory checkpoint of Zheng, Shi and Kale ("FTC-Charm++",
Cluster 2004). Two snapshots are kept, as a rank may die while copies are being made.

In memory this is four times a rank's part: 48 P / R bytes of float32 weights and Adam's two slots, for P
parameters and R ranks. Each time 12 P / R bytes travel to the peer, and to the rank that gathers a tensor the
shards of it that others have.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tf_dist.checkpoint import shards
from tf_dist.checkpoint.sharded_state import ShardedState
from tf_dist.comm.runtime.log_handlers import once
from tf_dist.comm.runtime.memory_limits import has_room
from tf_dist.comm.transport.base import Comm
from tf_dist.training.checkpoint_manager import SPARE
from tf_dist.training.snapshot import Check, Snapshot, matching

LOG = logging.getLogger(__name__)
# Place of the snapshots in an error.
WHERE = "memory (--replicate)"
# When copies were made: restarts of the job before, and copies since then. Later is greater.
When = tuple[int, int]


class PeerSnapshot(NamedTuple):
    """What one rank keeps of one snapshot.

    when, step, state: of it. tensors: name, shape and dtype of each, in order. owner_of: the rank, as
    numbered then, whose part each one belongs to. parts: bytes by owner: those of this rank and of a peer.
    """

    when: When
    step: int
    state: Mapping[str, Any]
    tensors: list[dict[str, Any]]
    owner_of: list[int]
    parts: dict[int, np.ndarray]


class CompleteSnapshot(NamedTuple):
    """A snapshot whose parts are all left. holder_of: by owner, the rank that has its part."""

    when: When
    step: int
    holder_of: dict[int, int]


class PeerCheckpoints:
    """The second `SnapshotStore`: keeps copies for a job, through all its restarts.

    Attributes:
        complete: the newest complete snapshot, as of the last `newest`.
    """

    def __init__(self) -> None:
        self._kept: list[PeerSnapshot] = []  # at most two, the newer one last
        self._buffers: list[np.ndarray] = []  # memory of dropped snapshots, for the next one
        self._last: When = (0, 0)
        self._said_full = False
        self.complete: CompleteSnapshot | None = None

    def save(self, snapshot: Snapshot, restarts: int = 0) -> None:
        """Copy this rank's part of a snapshot, and that of the peer before it; a collective.

        Args:
            snapshot: of now, between two steps.
            restarts: of the job so far.
        """
        whole = snapshot.shards
        comm, entries = whole.mesh.all, whole.entries
        self._last = (restarts, self._last[1] + 1 if self._last[0] == restarts else 1)
        if comm.size == 1:
            self.forget()
            return
        bytes_N = [entry.size_bytes for entry in entries]
        owner_of = shards.assign(bytes_N, range(comm.size))
        # All ranks come here with their last copies complete, before any of them drops the ones before.
        to, source = partners(comm.allgather_obj(socket.gethostname()), comm.rank)
        sizes = [shards.bytes_of(bytes_N, owner_of, owner) for owner in (comm.rank, source)]
        if not self._all_have_room(comm, sizes):
            return
        mine, theirs = (self._buffer(size) for size in sizes)
        offset = 0
        for _, _, tensor in whole.shard(owner_of):
            np.copyto(mine[offset : offset + tensor.nbytes].view(tensor.dtype), tensor.reshape(-1))
            offset += tensor.nbytes
        _exchange(comm, mine, to, theirs, source)
        tensors = [{"name": one.name, "shape": list(one.shape), "dtype": one.dtype} for one in entries]
        parts = {comm.rank: mine, source: theirs}
        kept = PeerSnapshot(self._last, snapshot.step, snapshot.state, tensors, owner_of, parts)
        self._kept.append(kept)
        self._buffers.clear()  # too small now: of a larger number of ranks

    def newest(self, comm: Comm, before: int | None = None) -> int | None:
        """As in `SnapshotSource`."""
        mine = [
            [*kept.when, kept.step, sorted(set(kept.owner_of)), sorted(kept.parts)]
            for kept in self._kept
            if before is None or kept.step < before
        ]
        found: dict[When, CompleteSnapshot] = {}
        owners: dict[When, set[int]] = {}
        for rank, theirs in enumerate(comm.allgather_obj(mine)):
            for restarts, count, step, all_owners, held in theirs:
                when = (restarts, count)
                owners[when] = set(all_owners)
                for owner in held:
                    found.setdefault(when, CompleteSnapshot(when, step, {})).holder_of.setdefault(owner, rank)
        whole = [when for when in found if owners[when] <= set(found[when].holder_of)]
        self.complete = found[max(whole)] if whole else None
        return None if self.complete is None else self.complete.step

    def hand_over(self, comm: Comm, count: int) -> None:
        """Send all parts to the first ``count`` ranks; the others do not train. A collective."""
        self.newest(comm)
        found = self.complete
        if found is None:
            return
        kept, to = self._of(found), min(found.holder_of.values())
        for owner, holder in found.holder_of.items():
            if holder < count or to >= count or kept is None:
                continue
            if holder == comm.rank:
                comm.isend(kept.parts[owner], to).wait()
            if to == comm.rank:
                sizes = [_size(tensor) for tensor in kept.tensors]
                kept.parts[owner] = np.empty(shards.bytes_of(sizes, kept.owner_of, owner), np.uint8)
                comm.irecv(kept.parts[owner], holder).wait()

    def restore(self, step: int, into: ShardedState, check: Check | None = None) -> dict[str, Any]:
        """As in `SnapshotSource`; a snapshot in memory is of this job, and needs no check."""
        comm, found = into.mesh.all, self.complete
        assert found is not None and found.step == step
        kept = self._of(found)
        # Later ones are incomplete, and must not push this one out.
        self._kept = [] if kept is None else [kept]
        root = min(found.holder_of.values())
        known = kept and [kept.state, kept.tensors, kept.owner_of]
        state, tensors, owner_of = comm.broadcast_obj(known, root)
        for entry, number in zip(into.entries, matching(tensors, into.entries, WHERE), strict=True):
            if number is None:
                into.set(entry, None)
                continue
            holder = found.holder_of[owner_of[number]]
            tensor = _tensor(kept, number) if kept and holder == comm.rank else None
            into.set(entry, tensor, holder)
        return dict(state)

    def where(self, step: int) -> str:
        """As in `SnapshotSource`."""
        return "memory"

    def forget(self) -> None:
        """Drop all snapshots: the training has returned to an earlier step."""
        self._kept.clear()

    def _all_have_room(self, comm: Comm, sizes: Sequence[int]) -> bool:
        while len(self._kept) > 1:
            self._drop_oldest()
        wanted = sum(sizes)
        mine = sum(buffer.size for buffer in self._buffers) >= wanted or has_room(SPARE * wanted, comm.size)
        fits = all(comm.allgather_obj(mine))
        if not fits and not self._said_full:
            self._said_full = True
            once(LOG, comm).warning(
                "--replicate: no memory for peer copies; after a death the newest checkpoint is used"
            )
        return fits

    def _of(self, found: CompleteSnapshot) -> PeerSnapshot | None:
        return next((one for one in self._kept if one.when == found.when), None)

    def _drop_oldest(self) -> None:
        self._buffers += self._kept.pop(0).parts.values()

    def _buffer(self, size: int) -> np.ndarray:
        """Memory for a part: the smallest dropped buffer that is large enough, or a new one."""
        fitting = [place for place, buffer in enumerate(self._buffers) if buffer.size >= size]
        if not fitting:
            return np.empty(size, np.uint8)
        buffer = self._buffers.pop(min(fitting, key=lambda place: self._buffers[place].size))
        return buffer[:size]


def partners(hosts: Sequence[str], rank: int) -> tuple[int, int]:
    """The peer that receives a copy of a rank's part, and the one whose part it keeps.

    They are on other hosts as far as possible, so that a host may be lost: the ring of ranks has the first
    rank of each host, then the second of each, and so on.

    Args:
        hosts: of each rank.
        rank: this one.
    """
    place = [hosts[:other].count(host) for other, host in enumerate(hosts)]
    ring = sorted(range(len(hosts)), key=lambda other: (place[other], other))
    at = ring.index(rank)
    return ring[(at + 1) % len(ring)], ring[at - 1]


def _exchange(comm: Comm, mine: np.ndarray, to: int, theirs: np.ndarray, source: int) -> None:
    coming = comm.irecv(theirs, source)
    going = comm.isend(mine, to)
    coming.wait()
    going.wait()


def _tensor(kept: PeerSnapshot, number: int) -> np.ndarray:
    """One of the tensors whose owner's part this rank has."""
    owner, sizes = kept.owner_of[number], [_size(one) for one in kept.tensors]
    offset = shards.bytes_of(sizes[:number], kept.owner_of[:number], owner)
    one = kept.tensors[number]
    raw = kept.parts[owner][offset : offset + sizes[number]]
    return np.ndarray(one["shape"], one["dtype"], raw.data)


def _size(tensor: Mapping[str, Any]) -> int:
    return int(prod(tensor["shape"]) * np.dtype(tensor["dtype"]).itemsize)
