"""Schedules as data: every grid is run, with messages matched in the order in which they were sent."""

from collections import Counter, defaultdict, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.comm.transport.base import TAGS
from tf_dist.errors import UsageError
from tf_dist.parallel.pipeline_schedules import (
    SCHEDULES,
    UNIT_COSTS,
    UNIT_COSTS_SPLIT,
    B,
    F,
    Instruction,
    Message,
    W,
    chunks_of,
    ideal_bubble,
    kept,
    schedule,
    simulate,
)


def costs(name):
    return UNIT_COSTS_SPLIT if name == "zero-bubble" else UNIT_COSTS


def bubble(name, ranks, micro_batches, virtual_stages=1):
    return simulate(schedule(name, ranks, micro_batches, virtual_stages), costs(name)).bubble


def run_with_messages(streams, chunks):
    """Run the streams rank by rank, as far as each gets, over one queue for each pair of ranks and tag.

    A rank takes whatever is first in the queue it looks into, as MPI would give it. Returns what each queue
    carried.
    """
    ranks = len(streams)
    queues, carried = defaultdict(deque), defaultdict(list)
    position = [0] * ranks

    def runs(rank, one):
        kind, chunk, i = one
        source = Message(F, chunk - 1) if kind == F else Message(B, chunk + 1)
        if kind != W and 0 <= source.chunk < chunks:
            queue = queues[source.chunk % ranks, rank, source.tag]
            if not queue:
                return False
            assert queue.popleft() == i, f"{one} gets the message of another micro-batch"
        target = chunk + 1 if kind == F else chunk - 1
        if kind != W and 0 <= target < chunks:
            place = (rank, target % ranks, Message(kind, chunk).tag)
            queues[place].append(i)
            carried[place].append(i)
        return True

    moved = True
    while moved:
        moved = False
        for rank, stream in enumerate(streams):
            while position[rank] < len(stream) and runs(rank, stream[position[rank]]):
                position[rank] += 1
                moved = True
    assert position == [len(stream) for stream in streams], "ranks wait for each other"
    assert not any(queues.values()), "a message was never taken"
    return carried


@settings(max_examples=300)
@given(
    st.sampled_from(SCHEDULES), st.integers(1, 8), st.integers(0, 20), st.integers(2, 4), st.integers(0, 24)
)
def test_every_grid_runs_to_its_end(name, ranks, micro_batches, virtual_stages, in_flight):
    streams = schedule(name, ranks, micro_batches, virtual_stages, in_flight)
    chunks = chunks_of(name, ranks, virtual_stages)
    carried = run_with_messages(streams, chunks)
    assert all(order == list(range(micro_batches)) for order in carried.values())
    kinds = [F, B, W] if name == "zero-bubble" else [F, B]
    everything = Counter(one for stream in streams for one in stream)
    wanted = [Instruction(k, c, i) for k in kinds for c in range(chunks) for i in range(micro_batches)]
    assert everything == Counter(wanted), "each pass is made once"
    for rank, stream in enumerate(streams):
        assert all(one.chunk % ranks == rank for one in stream)
        check_rank(stream, kinds)
        if in_flight:
            per_rank = chunks // ranks
            assert kept(stream) <= in_flight * per_rank
    simulate(streams, costs(name))


def check_rank(stream, kinds):
    """A chunk's passes come in the order of micro-batches, and each kind after the one it needs."""
    at = {one: place for place, one in enumerate(stream)}
    for one, place in at.items():
        later = kinds[kinds.index(one.kind) + 1 :]
        assert all(at[one._replace(kind=kind)] > place for kind in later)
        after = at.get(one._replace(micro_batch=one.micro_batch + 1))
        assert after is None or after > place, "sums of gradients take their leaves in order"


@given(st.integers(1, 8), st.integers(1, 24))
def test_bubbles_are_those_of_the_papers(ranks, micro_batches):
    for name in ("gpipe", "1f1b"):
        assert bubble(name, ranks, micro_batches) == pytest.approx((ranks - 1) / (micro_batches + ranks - 1))
    whole = ranks * micro_batches  # a multiple of p
    for v in (2, 3):
        expected = (ranks - 1) / (v * whole + ranks - 1)
        assert bubble("interleaved", ranks, whole, v) == pytest.approx(expected)
        assert ideal_bubble("interleaved", ranks, whole, v) == pytest.approx(expected)
    if micro_batches >= ranks:  # p - 1 of the 3 m + p - 1 units that a step takes: a third of 1f1b's
        expected = (ranks - 1) / (3 * micro_batches + ranks - 1)
        assert bubble("zero-bubble", ranks, micro_batches) == pytest.approx(expected)
    if ranks > 1:
        before = bubble("1f1b", ranks, micro_batches)
        assert bubble("zero-bubble", ranks, micro_batches) < before
        assert bubble("interleaved", ranks, micro_batches, 2) <= before + 1e-9


@given(st.integers(1, 8), st.integers(1, 24))
def test_activations_kept(ranks, micro_batches):
    most = {name: list(map(kept, schedule(name, ranks, micro_batches))) for name in ("gpipe", "1f1b")}
    assert most["gpipe"] == [micro_batches] * ranks
    assert most["1f1b"] == [min(micro_batches, ranks - rank) for rank in range(ranks)]
    zero_bubble = schedule("zero-bubble", ranks, micro_batches)
    assert max(map(kept, zero_bubble)) <= min(micro_batches, ranks), "no more than 1f1b's first rank"


def test_ranks_without_micro_batches_do_nothing():
    for name in SCHEDULES:
        streams = schedule(name, 3, 0, 2)
        assert streams == [[], [], []]
        assert simulate(streams, costs(name)) == (0.0, [0.0] * 3)


def test_a_circle_is_found():
    streams = [[Instruction(B, 0, 0), Instruction(F, 0, 0)], [Instruction(F, 1, 0), Instruction(B, 1, 0)]]
    with pytest.raises(RuntimeError, match="wait for each other"):
        simulate(streams, UNIT_COSTS)


def test_every_boundary_and_direction_has_a_tag():
    messages = [Message(kind, chunk) for chunk in range(TAGS // 2 - 1) for kind in (F, B)]
    assert len({message.tag for message in messages}) == len(messages)
    assert max(message.tag for message in messages) < TAGS


def test_unknown_schedules_are_refused():
    with pytest.raises(UsageError, match="unknown pipeline schedule 'dualpipe': gpipe, 1f1b, interleaved"):
        schedule("dualpipe", 2, 2)
