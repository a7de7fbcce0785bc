"""The whole model and its optimizer, of which ranks hold parts: its norm, its hash, and its checkpoint.

A checkpoint has one layout, that of one rank: every weight in the order in which the model makes them, then
the optimizer's variables in the order in which it would make them for the whole model. A rank holds *pieces*
of these tensors; they are put together one tensor after another, each on the rank that writes it, so that no
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

from tf_dist.parallel.flat import FlatLayout
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.norms import GlobalNorm, Run
from tf_dist.parallel.parts import Part, part_of
from tf_dist.training import elementwise
from tf_dist.training.pieces import Piece, variable_piece
from tf_dist.training.replica import Weights


class Given(NamedTuple):
    """A piece of a tensor, and the ranks that have it: the first one gives it to who has not."""

    ranks: list[int]
    part: Part
    start: int
    stop: int


@dataclass
class Entry:
    """A tensor of the whole model or its optimizer, and what this rank holds of it, if anything.

    alike: what several ranks hold of it is the same, bit for bit, so that each may write its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: list[Piece] = field(default_factory=list)
    given: list[Given] = field(default_factory=list)
    alike: bool = False

    @property
    def size_bytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * np.dtype(self.dtype).itemsize


class Whole:
    """All tensors of a model and its optimizer, in the order of one rank; a collective.

    Args:
        model: of the whole depth; this rank may hold some of its weights only, or parts of them.
        optimizer: built for what this rank trains.
        replica: this rank's; says what it holds.
        mesh: all ranks.
        more: tensors that belong to neither, at the end.
        alike: every rank takes the same steps with the same numbers.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: Any,
        replica: Weights,
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
        self._choose_givers()

    def _choose_givers(self) -> None:
        """Agree on who gives which pieces."""
        mine = [
            [number, list(p.part.whole), p.part.axis, _pairs(p.part), p.start, p.stop]
            for number, entry in enumerate(self.entries)
            for p in entry.pieces
        ]
        known: dict[Any, Given] = {}
        for rank, theirs in enumerate(self.mesh.all.allgather_obj(mine)):
            for number, whole, axis, pairs, start, stop in theirs:
                part = Part(tuple(whole), axis, pairs and tuple(range(*pair) for pair in pairs))
                place = (number, part, start, stop)
                if place not in known:
                    known[place] = Given([], part, start, stop)
                    self.entries[number].given.append(known[place])
                known[place].ranks.append(rank)
        for entry in self.entries:  # stages that share a weight may cut its optimizer state at other places
            all_of_it = [one for one in entry.given if one.stop - one.start == prod(entry.shape)]
            entry.given = all_of_it or entry.given  # whoever has all of it sends no parts as well

    def tensors(self, entries: Sequence[Entry] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Every tensor by name, put together on rank 0; elsewhere arrays of which only some elements are set.

        A collective: all ranks go through it to its end. An array is to be used before the next one is made.
        """
        for entry in self.entries if entries is None else entries:
            yield entry.name, self._assembled(entry)

    def shard(self, writer_of: Sequence[int]) -> Iterator[tuple[int, str, np.ndarray]]:
        """The tensors that this rank writes, each put together here: its place, its name, and itself.

        A collective: all ranks go through it to its end. An array is to be used before the next one is made.

        Args:
            writer_of: the rank that writes each of ``entries``.
        """
        for number, (entry, writer) in enumerate(zip(self.entries, writer_of, strict=True)):
            array = self._assembled(entry, writer)
            if writer == self.mesh.all.rank:
                yield number, entry.name, array

    def _assembled(self, entry: Entry, to: int = 0) -> np.ndarray:
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

    def take(self, arrays: Iterator[np.ndarray] | None) -> None:
        """Set every tensor; a collective.

        Args:
            arrays: on rank 0, each tensor in the order of ``entries``.
        """
        for entry in self.entries:
            self.set(entry, None if arrays is None else next(arrays))

    def set(self, entry: Entry, tensor: np.ndarray | None, root: int = 0) -> None:
        """Set one tensor, which ``root`` has; a collective."""
        array = np.zeros(prod(entry.shape), entry.dtype)
        if tensor is not None:
            array[:] = tensor.reshape(-1)
        self.mesh.all.broadcast(array.view(np.uint8) if array.dtype == bool else array, root)
        for piece in entry.pieces:
            part = np.ascontiguousarray(piece.part.take(array.reshape(entry.shape)))
            piece.write(part.reshape(-1)[piece.start : piece.stop])

    def weights_sha256(self) -> str:
        """SHA-256 of all weights in order of creation, as little-endian float32; a collective."""
        return str(self.mesh.all.broadcast_obj(sha256(array for _, array in self.tensors(self.weights))))


def sha256(weights: Iterable[np.ndarray]) -> str:
    """SHA-256 of arrays one after another, as little-endian float32."""
    sha = hashlib.sha256()
    for array in weights:
        sha.update(np.ascontiguousarray(array, dtype="<f4").data)
    return sha.hexdigest()


# What a rank holds ----------------------------------------------------------------------------------


def _weights(model: keras.Model, replica: Weights) -> list[Entry]:
    entries = []
    for number, variable in enumerate(model.weights):
        part = part_of(variable)
        entry = Entry(f"weights/{number:04d}/{variable.path}", part.whole, str(variable.dtype))
        entry.pieces = replica.pieces_of(variable)
        entry.alike = bool(variable.trainable)  # what else a layer keeps may be of a rank's own rows
        entries.append(entry)
    return entries


def _optimizer_state(model: keras.Model, optimizer: Any, replica: Weights) -> list[Entry]:
    """The optimizer's variables as it would have made them for the whole model."""
    if len(replica.variables) == len(model.trainable_variables) and replica.optimizer_step.whole_slots:
        return [
            _of_state(i, v.path, part.whole, str(v.dtype), [variable_piece(v, part)])
            for i, (v, part) in enumerate(_with_parts(optimizer, replica))
        ]
    return _Slots(model, optimizer, replica).entries()


def _of_state(number: int, path: str, shape: tuple[int, ...], dtype: str, pieces: list[Piece]) -> Entry:
    return Entry(f"optimizer/{number:04d}/{path}", shape, dtype, pieces, alike=True)


def _with_parts(optimizer: Any, replica: Weights) -> list[tuple[Any, Part]]:
    """An optimizer's variables; state of a part of a weight is the same part of the weight's state."""
    parts = {
        id(slot): part_of(variable)
        for slots in elementwise.slots_of(optimizer).values()
        for slot, variable in zip(slots, replica.variables, strict=True)
    }
    return [(v, parts.get(id(v)) or Part(tuple(v.shape))) for v in optimizer.variables]


Named = tuple[str, tuple[int, ...], str, list[Piece]]


class _Slots:
    """The optimizer's variables of a rank that has slots for some weights only, or for a stretch of them."""

    def __init__(self, model: keras.Model, optimizer: Any, replica: Weights) -> None:
        self.model, self.optimizer, self.replica = model, optimizer, replica
        self._place = {id(variable): place for place, variable in enumerate(replica.variables)}

    def entries(self) -> list[Entry]:
        """Single numbers and groups of slots, in the optimizer's order."""
        slots = elementwise.slots_of(self.optimizer)
        slot_of = {id(v): name for name, slot in slots.items() for v in slot}
        groups, done = slot_groups(self.optimizer), set[str]()
        found: list[Named] = []
        for variable in self.optimizer.variables:
            slot = slot_of.get(id(variable))
            if slot is None:
                part = Part(tuple(variable.shape))
                found.append(
                    (variable.path, part.whole, str(variable.dtype), [variable_piece(variable, part)])
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
                pieces = [] if place is None else self.replica.optimizer_step.slot_pieces(place, slot)
                made.append((path, part_of(variable).whole, str(variable.dtype), pieces))
        return made


def slot_groups(optimizer: Any) -> list[dict[str, str]]:
    """The order in which an elementwise optimizer makes state: slots of a group by turns for each weight.

    Found out with two weights of one number each. Adam with ``amsgrad`` has momentum and velocity by turns,
    and after those of all weights the largest velocity.

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


def _pairs(part: Part) -> list[list[int]] | None:
    return None if part.ranges is None else [[one.start, one.stop] for one in part.ranges]


def _place(whole: np.ndarray, part: Part, start: int, stop: int, values: np.ndarray) -> None:
    """Write a piece to its place in the whole tensor."""
    if (start, stop) == (0, prod(part.shape)):
        part.put(whole, values.reshape(part.shape))
        return
    held = np.array(part.take(whole)).reshape(-1)
    held[start:stop] = values
    part.put(whole, held.reshape(part.shape))


# The norm -------------------------------------------------------------------------------------------


def whole_norm(replica: Weights, trainable: Sequence[Any], mesh: Mesh) -> GlobalNorm:
    """The global norm of a gradient of which each rank of `Mesh.model` has a part; a collective.

    Args:
        replica: what this rank trains.
        trainable: the trainable variables of the whole model, in order.
        mesh: all ranks. What several ranks of ``mesh.model`` have counts on the first of them.

    Returns:
        The norm, to be asked with this rank's gradient, or where it steps a shard, with this of it.
    """
    layout = FlatLayout([part_of(variable).whole for variable in trainable])
    number = {id(variable): place for place, variable in enumerate(trainable)}
    parts = [part_of(variable) for variable in replica.variables]
    mine: list[Any] = [
        [number[id(v)], _pairs(part)] for v, part in zip(replica.variables, parts, strict=True)
    ]
    first: dict[str, int] = {}
    for rank, theirs in enumerate(mesh.model.allgather_obj(mine)):
        for held in theirs:
            first.setdefault(str(held), rank)
    runs: list[Run] = []
    for held, part, start in zip(mine, parts, replica.layout.starts[:-1], strict=True):
        if first[str(held)] == mesh.model.rank:
            whole = layout.starts[held[0]] if part.ranges is None else None
            _append(runs, Run(start, prod(part.shape), whole))
    shard = replica.own_shard
    if shard is None:
        return GlobalNorm(mesh.model, runs, layout.total)
    return GlobalNorm(mesh.all, [_inside(run, shard) for run in runs], layout.total)


def _inside(run: Run, shard: slice) -> Run:
    """What a shard has of a run, counted from the beginning of the shard; may be empty."""
    start, stop = max(run.start, shard.start), min(run.start + run.size, shard.stop)
    whole = None if run.whole is None else run.whole + start - run.start
    return Run(start - shard.start, max(0, stop - start), whole)


def _append(runs: list[Run], run: Run) -> None:
    """Add a run, to the one before it where they are neighbours in both."""
    if runs:
        start, size, whole = runs[-1]
        if whole is not None and (start + size, whole + size) == (run.start, run.whole):
            runs[-1] = Run(start, size + run.size, whole)
            return
    runs.append(run)
