"""Pipeline schedules as data: what each rank of a pipeline computes, in which order.

A model is split into chunks, chunk c lies on rank c mod p. For every micro-batch each chunk runs
forward (F) and backward (B); the zero-bubble schedule separates the gradients of the weights (W) from those
of the inputs (B), which another rank waits for.

    1f1b, 3 ranks, 4 micro-batches, B takes twice as long as F

    rank 0   F0 F1 F2  .  .  .  . B0 B0 F3 B1 B1  . B2 B2  . B3 B3
    rank 1    . F0 F1  .  . B0 B0 F2 B1 B1 F3 B2 B2  . B3 B3  .  .
    rank 2    .  . F0 B0 B0 F1 B1 B1 F2 B2 B2 F3 B3 B3  .  .  .  .

Messages follow from the instructions: the result of F of chunk c goes to chunk c + 1, that of B to chunk
c - 1. Each boundary between chunks has its own tag in each direction (`Message.tag`), and every schedule
here runs the F, the B and the W of one chunk in the order of the micro-batches, on every rank. So for each
tag messages are sent and received in the same order, and messages that overtake others do no harm. Sends do
not wait for receivers; a rank waits only for the message it needs next. Hence a step can only deadlock if the
instructions themselves form a cycle, which `simulate` would find: the tests check hundreds of meshes.

Legend: p ranks of the pipeline, m micro-batches, v chunks on a rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tf_dist.errors import UsageError

F, B, W = "F", "B", "W"
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")
# If F, B and W take equal time, and a B that includes W twice as long.
UNIT_COSTS = {F: 1, B: 2}
UNIT_COSTS_SPLIT = {F: 1, B: 1, W: 1}


class Instruction(NamedTuple):
    """One pass of one micro-batch through one chunk; ``kind`` is F, B or W."""

    kind: str
    chunk: int
    micro_batch: int


class Message(NamedTuple):
    """Output of a chunk. ``kind`` F: activations for the next one; B: a gradient for the previous one."""

    kind: str
    chunk: int

    @property
    def tag(self) -> int:
        """Tag of this boundary and direction; below twice the number of chunks."""
        return 2 * self.chunk + (self.kind == B)


def chunks_of(name: str, ranks: int, virtual_stages: int) -> int:
    """Number of chunks into which the model is split."""
    return ranks * (virtual_stages if name == "interleaved" else 1)


def schedule(
    name: str, ranks: int, micro_batches: int, virtual_stages: int = 1, in_flight: int = 0
) -> list[list[Instruction]]:
    """Instructions of each rank for a step, (p,) lists.

    Args:
        name: one of `SCHEDULES`:
            gpipe: all forward, then all backward (Huang et al. 2019);
            1f1b: a backward pass as soon as possible, so that no rank keeps more than p micro-batches
            (PipeDream-Flush, Narayanan et al. 2021a);
            interleaved: the same with v chunks per rank, for a v-th of the bubble (Megatron-LM, Narayanan et
            al. 2021b);
            zero-bubble: ZB-H1 (Qi et al. 2023), 1f1b whose idle time at the end is filled with W.
        ranks: p.
        micro_batches: m; 0: no instructions.
        virtual_stages: v, of the interleaved schedule.
        in_flight: micro-batches whose activations a rank keeps, at most; 0: the schedule's own limit.

    Raises:
        UsageError: unknown schedule.
    """
    if name not in SCHEDULES:
        raise UsageError(f"unknown pipeline schedule {name!r}: {', '.join(SCHEDULES)}")
    limit = in_flight or max(1, ranks, micro_batches)
    if name == "interleaved":
        return [_interleaved(rank, ranks, micro_batches, virtual_stages, limit) for rank in range(ranks)]
    if name == "zero-bubble":
        return [_zero_bubble(rank, ranks, micro_batches, limit) for rank in range(ranks)]
    ahead = [min(limit, ranks - rank if name == "1f1b" else limit) for rank in range(ranks)]
    return [_alternating(_passes(F, rank, micro_batches), _passes(B, rank, micro_batches), ahead[rank])
            for rank in range(ranks)]  # fmt: skip


def _passes(kind: str, chunk: int, micro_batches: int) -> list[Instruction]:
    return [Instruction(kind, chunk, i) for i in range(micro_batches)]


def _alternating(forward: list[Instruction], backward: list[Instruction], ahead: int) -> list[Instruction]:
    """Alternate forward and backward passes, with the forward ones ``ahead`` while there are any."""
    made = forward[:ahead]
    for number, back in enumerate(backward):
        made.append(back)
        made += forward[ahead + number : ahead + number + 1]
    return made


def _zero_bubble(rank: int, ranks: int, micro_batches: int, limit: int) -> list[Instruction]:
    """1f1b with delayed W: later ranks, which keep fewer micro-batches, delay it longer."""
    ahead = min(limit, ranks - rank)
    late = min(rank, limit - ahead)
    forward, back, weights = (_passes(kind, rank, micro_batches) for kind in (F, B, W))
    made = forward[:ahead]
    for number in range(micro_batches):
        made.append(back[number])
        made += weights[number - late : number - late + 1] if number >= late else []
        made += forward[ahead + number : ahead + number + 1]
    return made + weights[max(0, micro_batches - late) :]


def _interleaved(
    rank: int, ranks: int, micro_batches: int, virtual_stages: int, limit: int
) -> list[Instruction]:
    """Micro-batches in groups of p; each group runs through all chunks of a rank before the next one starts.

    If fewer than p micro-batches may be in flight, groups have that size. An incomplete last group is padded
    with micro-batches which are then removed: fewer passes in the same order add no dependencies.
    """
    size = min(ranks, limit)
    groups = [range(start, start + size) for start in range(0, micro_batches, size)]
    mine = range(rank, ranks * virtual_stages, ranks)
    forward = [Instruction(F, c, i) for group in groups for c in mine for i in group]
    back = [Instruction(B, c, i) for group in groups for c in reversed(mine) for i in group]
    ahead = (virtual_stages - 1) * size + 2 * (ranks - rank - 1) + 1
    made = _alternating(forward, back, min(ahead, virtual_stages * limit))
    return [one for one in made if one.micro_batch < micro_batches]


def kept(instructions: Sequence[Instruction]) -> int:
    """The largest number of passes whose activations a rank keeps, from F until the chunk's last use."""
    last = W if any(one.kind == W for one in instructions) else B
    now = most = 0
    for one in instructions:
        now += (one.kind == F) - (one.kind == last)
        most = max(most, now)
    return most


def ideal_bubble(name: str, ranks: int, micro_batches: int, virtual_stages: int = 1) -> float:
    """Fraction of a step in which a rank is idle, according to the schedules' papers.

    Assumes that forward, input gradient and weight gradient take equal time in every chunk, and messages no
    time. For m a multiple of p (interleaved) and at least p (zero-bubble).
    """
    work = {"interleaved": virtual_stages * micro_batches, "zero-bubble": 3 * micro_batches}
    busy = work.get(name, micro_batches)
    return (ranks - 1) / (busy + ranks - 1)


class Simulation(NamedTuple):
    """Timeline of a step. span: its duration; busy: computing time of each rank, (p,)."""

    span: float
    busy: list[float]

    @property
    def bubble(self) -> float:
        """Fraction of the ranks' time in which they are idle."""
        return 1 - sum(self.busy) / (self.span * len(self.busy)) if self.span else 0.0


def simulate(streams: Sequence[Sequence[Instruction]], costs: Mapping[str, float]) -> Simulation:
    """Run the instructions of all ranks, with instant messages.

    Args:
        streams: instructions of each rank, (p,).
        costs: duration of each kind.

    Raises:
        RuntimeError: deadlock, or a rank waits for a message that is never sent.
    """
    chunks = 1 + max((one.chunk for stream in streams for one in stream), default=0)
    done: dict[Instruction, float] = {}
    next_up, clock, busy = Counter[int](), [0.0] * len(streams), [0.0] * len(streams)
    moved = True
    while moved:
        moved = False
        for rank, stream in enumerate(streams):
            while next_up[rank] < len(stream):
                one = stream[next_up[rank]]
                needed = needs(one, chunks)
                if not all(before in done for before in needed):
                    break
                begun = max([clock[rank], *(done[before] for before in needed)])
                done[one] = clock[rank] = begun + costs[one.kind]
                busy[rank] += costs[one.kind]
                next_up[rank] += 1
                moved = True
    stuck = {
        rank: stream[next_up[rank]] for rank, stream in enumerate(streams) if next_up[rank] < len(stream)
    }
    if stuck:
        raise RuntimeError(f"ranks wait for each other: {stuck}")
    return Simulation(max(clock, default=0.0), busy)


def needs(one: Instruction, chunks: int) -> list[Instruction]:
    """Passes that must finish before this one can start."""
    kind, chunk, i = one
    if kind == F:
        return [Instruction(F, chunk - 1, i)] if chunk else []
    own = Instruction(F if kind == B else B, chunk, i)
    if kind == B and chunk < chunks - 1:
        return [own, Instruction(B, chunk + 1, i)]
    return [own]
