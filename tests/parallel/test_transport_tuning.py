import time

import numpy as np
import pytest
from thread_comm import ThreadComm, on_ranks

from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError, UsageError
from tf_dist.parallel import transport_tuning
from tf_dist.parallel.reduction_tree import order
from tf_dist.parallel.transport_tuning import choose

ORDER = order(range(2), [range(1), range(1, 2)])


class Windowed(ThreadComm):
    """A Comm with a window, whose sums take as long as they are told to."""

    seconds_in_window, opened = 0.0, False

    def term_buffers(self, length, order):
        self.opened, self.carried_by = True, "a shared window"
        return lambda: [np.zeros(length, np.float32)]

    def forget_buffers(self, length, order):
        self.opened = False

    def _allreduce_terms(self, terms, order, out):
        time.sleep(self.seconds_in_window if self.opened else 0.02)
        return super()._allreduce_terms(terms, order, out)


def test_one_rank_has_nothing_to_choose():
    assert choose(SerialComm(), 5, order(range(1), [range(1)])).buffers is None


def test_unknown():
    with pytest.raises(UsageError, match="auto, window, messages"):
        choose(SerialComm(), 5, ORDER, "pigeons")


@pytest.mark.parametrize(
    ("wanted", "window", "opened"),
    [("auto", 0.0, True), ("auto", 0.05, False), ("window", 0.05, True), ("messages", 0.0, False)],
)
def test_what_is_faster_or_was_wanted(wanted, window, opened):
    class Here(Windowed):
        seconds_in_window = window

    def work(comm):
        chosen = choose(comm, 5, ORDER, wanted)
        return comm.opened, chosen.buffers is not None, chosen.said

    (first, second) = on_ranks(2, work, Here)
    assert first == second
    assert first[:2] == (opened, opened)
    assert ("in a shared window, " if opened else "by messages, ") in first[2]


def test_no_window():
    assert all("by messages, " in said.said for said in on_ranks(2, lambda comm: choose(comm, 5, ORDER)))
    outcomes = on_ranks(2, lambda comm: choose(comm, 5, ORDER, "window"))
    assert all(isinstance(outcome, LaunchError) and "there is none" in str(outcome) for outcome in outcomes)


class Spread(ThreadComm):
    """Ranks of two nodes. Sums in pieces of 2 MiB take long, those in pieces of 512 KiB do not."""

    def nodes(self):
        return 2

    def _allreduce_terms(self, terms, order, out):
        time.sleep(0.05 if self.chunk_bytes == 2 << 20 else 0.0)
        return super()._allreduce_terms(terms, order, out)


def test_pieces_are_measured_where_ranks_span_nodes(monkeypatch):
    # Enough time to try all of it in: on a busy machine the first sum may take many times as long as it says.
    monkeypatch.setattr(transport_tuning, "CHUNK_PROBE_S", 60.0)

    def work(comm):
        said = choose(comm, 1_500_000, ORDER).said
        return comm.chunk_bytes, said

    (first, second) = on_ranks(2, work, Spread)
    assert first == second
    assert first[0] != 2 << 20
    assert first[1].startswith("by messages, each rank being alone on its node; in pieces of ")
    assert "512 KiB" in first[1]


def test_pieces_can_be_pinned():
    def work(comm):
        return choose(comm, 5, ORDER, chunk_bytes=4096).said, comm.chunk_bytes

    assert all(
        said.endswith("; in pieces of 4 KiB, as was asked for") and size == 4096
        for said, size in on_ranks(2, work)
    )
    assert all("pieces" not in said.said for said in on_ranks(2, lambda comm: choose(comm, 5, ORDER)))
