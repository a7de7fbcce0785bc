"""Sharded state of model and optimizer: its hash, and conversion to and from a checkpoint.

A checkpoint has one layout, that of one rank: every weight in the model's order of creation, then
the optimizer's variables in their order of creation for the full model. A rank holds *shards*
of these tensors; they are gathered one tensor at a time, each on the rank that writes it, so that no
rank ever has all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import keras
import numpy as np

from tf_dist.optim import elementwise
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.sharding import ShardSpec, part_of
from tf_dist.parallel.tensor_shard import TensorShard, variable_shard
from tf_dist.runners.replica import FlatParameters


class HeldPart(NamedTuple):
    """A shard of a tensor, and the ranks that have it: the first one sends it to ranks that do not."""

    ranks: list[int]
    part: ShardSpec
    start: int
    stop: int


@dataclass
class Entry:
    """A tensor of the global model or optimizer state, and this rank's shards of it, if any.

    alike: replicated shards are bit-identical, so that each rank may write its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: list[TensorShard] = field(default_factory=list)
    given: list[HeldPart] = field(default_factory=list)
    alike: bool = False

    @property
    def size_bytes(self) -> int:
        """Size of the global tensor in bytes."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class ShardedState:
    """All tensors of a model and its optimizer, in the order of one rank; a collective.

    Args:
        model: with all layers; this rank may hold only some of its weights, or shards of them.
        optimizer: built for this rank's trainable variables.
        replica: this rank's; knows its shards.
        mesh: all ranks.
        more: other tensors, appended at the end.
        alike: every rank takes the same steps with the same numbers.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: Any,
        replica: FlatParameters,
        mesh: Mesh,
        more: Sequence[Entry] = (),
        alike: bool = False,
    ) -> None:
        self.mesh = mesh
        self.weights = _weights(model, replica)
        self.state = _optimizer_state(model, optimizer, replica)
        for entry in self.weights + self.state:
            entry.alike = alike and entry.alike
        self.entries = self.weights + self.state + list(more)
        self._choose_senders()

    def _choose_senders(self) -> None:
        """Agree on the sender of each shard."""
        mine = [
            [number, list(p.part.whole), p.part.axis, p.part.pairs, p.start, p.stop]
            for number, entry in enumerate(self.entries)
            for p in entry.pieces
        ]
        known: dict[Any, HeldPart] = {}
        for rank, theirs in enumerate(self.mesh.all.allgather_obj(mine)):
            for number, whole, axis, pairs, start, stop in theirs:
                part = ShardSpec(tuple(whole), axis, pairs and tuple(range(*pair) for pair in pairs))
                place = (number, part, start, stop)
                if place not in known:
                    known[place] = HeldPart([], part, start, stop)
                    self.entries[number].given.append(known[place])
                known[place].ranks.append(rank)
        for entry in self.entries:  # stages that share a weight may shard its optimizer state differently
            all_of_it = [one for one in entry.given if one.stop - one.start == prod(entry.shape)]
            entry.given = all_of_it or entry.given  # a rank with the full tensor sends no shards of it

    def tensors(self, entries: Sequence[Entry] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by name, gathered on rank 0; on other ranks the arrays are only partly set.

        A collective: all ranks exhaust the iterator. An array is valid until the next one is requested.
        """
        for entry in self.entries if entries is None else entries:
            yield entry.name, self._gather_tensor(entry)

    def shard(self, writer_of: Sequence[int]) -> Iterator[tuple[int, str, np.ndarray]]:
        """The tensors that this rank writes, each gathered here: its index, its name, and itself.

        A collective: all ranks exhaust the iterator. An array is valid until the next one is requested.

        Args:
            writer_of: the rank that writes each of ``entries``.
        """
        for number, (entry, writer) in enumerate(zip(self.entries, writer_of, strict=True)):
            array = self._gather_tensor(entry, writer)
            if writer == self.mesh.all.rank:
                yield number, entry.name, array

    def _gather_tensor(self, entry: Entry, to: int = 0) -> np.ndarray:
        """Gather one tensor to rank ``to``; on other ranks the returned array is meaningless."""
        comm = self.mesh.all
        mine = {(p.part, p.start, p.stop): p for p in entry.pieces}
        whole = np.zeros(entry.shape if comm.rank == to else (), entry.dtype)
        for ranks, part, start, stop in entry.given:
            giver = to if entry.alike and to in ranks else ranks[0]
            if giver == comm.rank:
                values = np.ascontiguousarray(mine[part, start, stop].read())
                if giver != to:
                    comm.isend(values.view(np.uint8), to).wait()
            if comm.rank == to:
                if giver != to:
                    values = np.empty(stop - start, entry.dtype)
                    comm.irecv(values.view(np.uint8), giver).wait()
                if part.shape == entry.shape and stop - start == prod(entry.shape):
                    return values.reshape(entry.shape)
                _place(whole, part, start, stop, values)
        return whole

    def receive(self, entry: Entry, tensor: np.ndarray | None, root: int = 0) -> list[np.ndarray]:
        """Get this rank's shards of a tensor that ``root`` has; nothing is set yet. A collective.

        Args:
            entry: the tensor.
            tensor: on ``root``; None there: all zeros.
            root: the rank that has it.

        Returns:
            1-D values of each of ``entry.pieces``, in memory of their own.
        """
        array = np.zeros(prod(entry.shape), entry.dtype)
        if tensor is not None:
            array[:] = tensor.reshape(-1)
        self.mesh.all.broadcast(array.view(np.uint8) if array.dtype == bool else array, root)
        shards = []
        for piece in entry.pieces:
            part = np.ascontiguousarray(piece.part.take(array.reshape(entry.shape)))
            values = part.reshape(-1)[piece.start : piece.stop]
            # A view would keep alive all of the tensor for the sake of a shard.
            shards.append(values if values.size == array.size else values.copy())
        return shards

    def set(self, entry: Entry, tensor: np.ndarray | None, root: int = 0) -> None:
        """Set one tensor, which ``root`` has; a collective."""
        write(entry, self.receive(entry, tensor, root))

    @property
    def held_bytes(self) -> int:
        """Size of all shards of this rank."""
        return sum(
            (piece.stop - piece.start) * np.dtype(entry.dtype).itemsize
            for entry in self.entries
            for piece in entry.pieces
        )

    def weights_sha256(self) -> str:
        """SHA-256 of all weights in order of creation, as little-endian float32; a collective."""
        return str(self.mesh.all.broadcast_obj(sha256(array for _, array in self.tensors(self.weights))))


def write(entry: Entry, shards: Iterable[np.ndarray]) -> None:
    """Set this rank's shards of a tensor, from `ShardedState.receive`."""
    for piece, values in zip(entry.pieces, shards, strict=True):
        piece.write(values)


def sha256(weights: Iterable[np.ndarray]) -> str:
    """SHA-256 of concatenated arrays, as little-endian float32."""
    sha = hashlib.sha256()
    for array in weights:
        sha.update(np.ascontiguousarray(array, dtype="<f4").data)
    return sha.hexdigest()


# Shards of a rank -----------------------------------------------------------------------------------


def _weights(model: keras.Model, replica: FlatParameters) -> list[Entry]:
    entries = []
    for number, variable in enumerate(model.weights):
        part = part_of(variable)
        entry = Entry(f"weights/{number:04d}/{variable.path}", part.whole, str(variable.dtype))
        entry.pieces = replica.shards_of(variable)
        entry.alike = bool(variable.trainable)  # other state of a layer may depend on a rank's own rows
        entries.append(entry)
    return entries


def _optimizer_state(model: keras.Model, optimizer: Any, replica: FlatParameters) -> list[Entry]:
    """The optimizer's variables in their order of creation for the full model."""
    if len(replica.variables) == len(model.trainable_variables) and replica.optimizer_step.has_all_slots:
        return [
            _of_state(i, v.path, part.whole, str(v.dtype), [variable_shard(v, part)])
            for i, (v, part) in enumerate(_with_parts(optimizer, replica))
        ]
    return _Slots(model, optimizer, replica).entries()


def _of_state(number: int, path: str, shape: tuple[int, ...], dtype: str, pieces: list[TensorShard]) -> Entry:
    return Entry(f"optimizer/{number:04d}/{path}", shape, dtype, pieces, alike=True)


def _with_parts(optimizer: Any, replica: FlatParameters) -> list[tuple[Any, ShardSpec]]:
    """An optimizer's variables with their sharding: state is sharded like its weight."""
    parts = {
        id(slot): part_of(variable)
        for slots in elementwise.slots_of(optimizer).values()
        for slot, variable in zip(slots, replica.variables, strict=True)
    }
    return [(v, parts.get(id(v)) or ShardSpec(tuple(v.shape))) for v in optimizer.variables]


Named = tuple[str, tuple[int, ...], str, list[TensorShard]]


class _Slots:
    """The optimizer's variables of a rank that has slots for some weights only, or for slices of them."""

    def __init__(self, model: keras.Model, optimizer: Any, replica: FlatParameters) -> None:
        self.model, self.optimizer, self.replica = model, optimizer, replica
        self._place = {id(variable): place for place, variable in enumerate(replica.variables)}

    def entries(self) -> list[Entry]:
        """Scalars and groups of slots, in the optimizer's order."""
        slots = elementwise.slots_of(self.optimizer)
        slot_of = {id(v): name for name, slot in slots.items() for v in slot}
        groups, done = slot_groups(self.optimizer), set[str]()
        found: list[Named] = []
        for variable in self.optimizer.variables:
            slot = slot_of.get(id(variable))
            if slot is None:
                part = ShardSpec(tuple(variable.shape))
                found.append(
                    (variable.path, part.whole, str(variable.dtype), [variable_shard(variable, part)])
                )
            elif slot not in done:
                group = next(group for group in groups if slot in group)
                done |= set(group)
                found += self._of_group(group)
        return [_of_state(i, *one) for i, one in enumerate(found)]

    def _of_group(self, group: dict[str, str]) -> list[Named]:
        made = []
        for variable in self.model.trainable_variables:
            for slot, suffix in group.items():
                path = f"{self.optimizer.name}/{variable.path.replace('/', '_')}_{suffix}"
                place = self._place.get(id(variable))
                pieces = [] if place is None else self.replica.optimizer_step.slot_shards(place, slot)
                made.append((path, part_of(variable).whole, str(variable.dtype), pieces))
        return made


def slot_groups(optimizer: Any) -> list[dict[str, str]]:
    """The order in which an elementwise optimizer creates state: per group, weight by weight.

    Determined with two weights of one element each. Adam with ``amsgrad`` has momentum and velocity
    alternating, followed by the largest velocity of all weights.

    Returns:
        For each group the attribute and the name of each slot.
    """
    config = optimizer.get_config()
    probe = type(optimizer).from_config({**config, "learning_rate": 0.1})
    two = [keras.Variable(0.0, name=name) for name in ("probe_a", "probe_b")]
    probe.build(two)
    slot_of = {
        id(v): (name, i) for name, slot in elementwise.slots_of(probe).items() for i, v in enumerate(slot)
    }
    groups: list[dict[str, str]] = []
    before = 1
    for variable in probe.variables:
        if id(variable) not in slot_of:
            continue
        name, i = slot_of[id(variable)]
        if i == 0:
            if before == 1:
                groups.append({})
            groups[-1][name] = variable.path.rsplit(f"{two[0].path.replace('/', '_')}_", 1)[1]
        before = i
    return groups


def _place(whole: np.ndarray, part: ShardSpec, start: int, stop: int, values: np.ndarray) -> None:
    """Write a shard to its position in the global tensor."""
    if (start, stop) == (0, prod(part.shape)):
        part.put(whole, values.reshape(part.shape))
        return
    held = np.array(part.take(whole)).reshape(-1)
    held[start:stop] = values
    part.put(whole, held.reshape(part.shape))
