"""Copies in memory of all that a training has: each rank keeps its share of the tensors, and that of another.

What a rank alone has (a stretch of the optimizer, layers, a master's everything) is not lost with it then. At
a death the others begin again (`begin_again`), not from the newest checkpoint, but from where they last kept
copies, with nothing read from a disk. This is the double in-memory checkpoint of Zheng, Shi and Kale ("FTC-
Charm++", Cluster 2004). Two times are kept, for somebody may die while copies are being made.

In memory this is four times a rank's share: 48 P / R bytes of float32 weights and Adam's two slots, for P
parameters and R ranks. Each time 12 P / R bytes travel to the neighbour, and to the rank that puts a tensor
together what others have of it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.comm.room import has_room
from tf_dist.training import shards
from tf_dist.training.saving import SPARE, position
from tf_dist.training.state import go_on_at, matching
from tf_dist.training.trainer import Trainer

# What an error calls them.
WHERE = "memory (--replicate)"
# When copies were made: trainings that the job had begun before, and copies in this one. Later is greater.
When = tuple[int, int]


class Kept(NamedTuple):
    """What one rank keeps of one time.

    step, facts: of the training then. tensors: name, shape and dtype of each, in order. owner_of: the rank,
    as numbered then, of whose share each one is. shares: bytes by owner: those of this rank and of another.
    """

    when: When
    step: int
    facts: Mapping[str, Any]
    tensors: list[dict[str, Any]]
    owner_of: list[int]
    shares: dict[int, np.ndarray]


class Found(NamedTuple):
    """A time of which the ranks that are left have everything. holder_of: by owner, the rank that has it."""

    when: When
    step: int
    holder_of: dict[int, int]


class Neighbours:
    """Keeps copies for a job, through all trainings that it begins.

    Args:
        say: told what a user might wonder about; the first rank's is to be heard.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._kept: list[Kept] = []  # at most two, the newer one last
        self._rooms: list[np.ndarray] = []  # for the next copies: memory of what has been given up
        self._last: When = (0, 0)
        self._said_full = False

    def keep(self, trainer: Trainer, facts: Mapping[str, Any], training: int = 0) -> None:
        """Copy this rank's share, and that of the rank before it; a collective, between two steps.

        Args:
            trainer: whose state it is.
            facts: JSON values to be kept with it.
            training: of those that the job has begun, counted from 0 on.
        """
        comm, entries = trainer.comm, trainer.whole().entries
        self._last = (training, self._last[1] + 1 if self._last[0] == training else 1)
        if comm.size == 1:
            self.forget()
            return
        bytes_N = [entry.size_bytes for entry in entries]
        owner_of = shards.dealt(bytes_N, range(comm.size))
        # All have come to this with the last copies in hand, before anybody gives up the ones before.
        to, source = partners(comm.allgather_obj(socket.gethostname()), comm.rank)
        sizes = [shards.bytes_of(bytes_N, owner_of, owner) for owner in (comm.rank, source)]
        if not self._all_have_room(comm, sizes):
            return
        mine, theirs = (self._room(size) for size in sizes)
        offset = 0
        for _, _, tensor in trainer.whole().shard(owner_of):
            np.copyto(mine[offset : offset + tensor.nbytes].view(tensor.dtype), tensor.reshape(-1))
            offset += tensor.nbytes
        _exchange(comm, mine, to, theirs, source)
        tensors = [{"name": one.name, "shape": list(one.shape), "dtype": one.dtype} for one in entries]
        shares = {comm.rank: mine, source: theirs}
        facts = {**position(trainer), **facts}
        self._kept.append(Kept(self._last, trainer.step, facts, tensors, owner_of, shares))
        self._rooms.clear()  # what is too small now: of a larger number of ranks

    def newest(self, comm: Comm) -> Found | None:
        """The last time of which everything is left; None where there is none. A collective."""
        mine = [
            [*kept.when, kept.step, sorted(set(kept.owner_of)), sorted(kept.shares)] for kept in self._kept
        ]
        found: dict[When, Found] = {}
        owners: dict[When, set[int]] = {}
        for rank, theirs in enumerate(comm.allgather_obj(mine)):
            for training, count, step, all_owners, held in theirs:
                when = (training, count)
                owners[when] = set(all_owners)
                for owner in held:
                    found.setdefault(when, Found(when, step, {})).holder_of.setdefault(owner, rank)
        whole = [when for when in found if owners[when] <= set(found[when].holder_of)]
        return found[max(whole)] if whole else None

    def hand_over(self, comm: Comm, count: int) -> None:
        """Let the first ``count`` ranks have all that is left; the others do not train. A collective."""
        found = self.newest(comm)
        if found is None:
            return
        kept, to = self._of(found), min(found.holder_of.values())
        for owner, holder in found.holder_of.items():
            if holder < count or to >= count or kept is None:
                continue
            if holder == comm.rank:
                comm.isend(kept.shares[owner], to).wait()
            if to == comm.rank:
                sizes = [_size(tensor) for tensor in kept.tensors]
                kept.shares[owner] = np.empty(shards.bytes_of(sizes, kept.owner_of, owner), np.uint8)
                comm.irecv(kept.shares[owner], holder).wait()

    def give_back(self, trainer: Trainer, found: Found) -> dict[str, Any]:
        """Be where all were at that time; a collective.

        Returns:
            The facts that were kept.

        Raises:
            CheckpointError: this is another model or optimizer.
        """
        comm, whole = trainer.comm, trainer.whole()
        kept = self._of(found)
        # Later ones were not finished when somebody died, and are not to push this one out.
        self._kept = [] if kept is None else [kept]
        root = min(found.holder_of.values())
        known = kept and [kept.facts, kept.tensors, kept.owner_of]
        facts, tensors, owner_of = comm.broadcast_obj(known, root)
        go_on_at(trainer, found.step, facts)
        for entry, number in zip(whole.entries, matching(tensors, whole.entries, WHERE), strict=True):
            if number is None:
                whole.set(entry, None)
                continue
            holder = found.holder_of[owner_of[number]]
            tensor = _tensor(kept, number) if kept and holder == comm.rank else None
            whole.set(entry, tensor, holder)
        return dict(facts)

    def forget(self) -> None:
        """Nothing that was kept is to be gone on from: the training has gone back to before it."""
        self._kept.clear()

    def _all_have_room(self, comm: Comm, sizes: Sequence[int]) -> bool:
        while len(self._kept) > 1:
            self._give_up_oldest()
        wanted = sum(sizes)
        mine = sum(room.size for room in self._rooms) >= wanted or has_room(SPARE * wanted, comm.size)
        fits = all(comm.allgather_obj(mine))
        if not fits and not self._said_full:
            self._said_full = True
            self._say("--replicate: there is no room for copies; what dies is read from a checkpoint")
        return fits

    def _of(self, found: Found) -> Kept | None:
        return next((one for one in self._kept if one.when == found.when), None)

    def _give_up_oldest(self) -> None:
        self._rooms += self._kept.pop(0).shares.values()

    def _room(self, size: int) -> np.ndarray:
        """Memory for a share: some that was used before where there is any that fits best."""
        fitting = [place for place, room in enumerate(self._rooms) if room.size >= size]
        if not fitting:
            return np.empty(size, np.uint8)
        room = self._rooms.pop(min(fitting, key=lambda place: self._rooms[place].size))
        return room[:size]


def partners(hosts: Sequence[str], rank: int) -> tuple[int, int]:
    """To whom a rank gives a copy of its share, and of whom it has one.

    Those are on other hosts as far as there are others, so that a host may be lost: ranks stand in a ring,
    the first of each host, then the second of each, and so on.

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


def _tensor(kept: Kept, number: int) -> np.ndarray:
    """One of the tensors whose share this rank has."""
    owner, sizes = kept.owner_of[number], [_size(one) for one in kept.tensors]
    offset = shards.bytes_of(sizes[:number], kept.owner_of[:number], owner)
    one = kept.tensors[number]
    raw = kept.shares[owner][offset : offset + sizes[number]]
    return np.ndarray(one["shape"], one["dtype"], raw.data)


def _size(tensor: Mapping[str, Any]) -> int:
    return int(prod(tensor["shape"]) * np.dtype(tensor["dtype"]).itemsize)
