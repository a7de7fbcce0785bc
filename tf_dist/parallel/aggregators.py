"""Aggregators by name, and those that sum gradients whole.

Legend: P elements of a flat gradient, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.options import option
from tf_dist.parallel.aggregator import Aggregator as Aggregator
from tf_dist.parallel.aggregator import elements_of
from tf_dist.parallel.compress import COMPRESSORS
from tf_dist.parallel.compress import BFloat16 as BFloat16
from tf_dist.parallel.compress import OneBit as OneBit
from tf_dist.parallel.compress import PowerSGD as PowerSGD
from tf_dist.parallel.compress import TopK as TopK
from tf_dist.parallel.reduction_tree import one_each
from tf_dist.parallel.transport_tuning import CHOICES, choose
from tf_dist.spelling import did_you_mean

# Lengths of gradients for which aggregators open a window of a Comm: each takes (R + 1) P elements of a node,
# for as long as the job lives, and a script may make many models.
MOST_WINDOWS = 8
_opened: WeakKeyDictionary[Comm, set[int]] = WeakKeyDictionary()

Places = Callable[[], list[np.ndarray]]


class Allreduce(Aggregator):
    """The transport's own sum: `MPI_Allreduce`, or Horovod's; the order of additions is theirs."""

    name = "allreduce"

    def aggregate(self, gradient: np.ndarray, comm: Comm, out: np.ndarray) -> np.ndarray:
        """As in `Aggregator`."""
        return _summed_by_transport(gradient, comm, out)


def _summed_by_transport(gradient: np.ndarray, comm: Comm, out: np.ndarray) -> np.ndarray:
    if out is not gradient:
        np.copyto(out, gradient)
    comm.allreduce(out)
    return out


@dataclass(frozen=True)
class FixedOrderOptions:
    """carrier: "auto" is a window where ranks share memory, else messages. The bits are the same."""

    carrier: str = option("auto", "aggregator", "what carries sums of gradients", choices=CHOICES)


class FixedOrder(Aggregator):
    """Sums in the order of one binary tree (`tf_dist.parallel.reduction_tree`), whatever carries them.

    The same bits in every run of R ranks. Those of another number of ranks only where terms are those of
    micro-batches, as in `Trainer`: `model.fit` has one term a rank.
    """

    name, Options, by_horovod = "fixed-order", FixedOrderOptions, False

    def __init__(self, options: FixedOrderOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        self._places: dict[int, Places | None] = {}

    def setup(self, shapes: Sequence[tuple[int, ...]], comm: Comm) -> None:
        """As in `Aggregator`.

        Raises:
            LaunchError: a window was wanted, and the ranks have none.
        """
        length = elements_of(shapes)
        if length not in self._places:
            wanted = self.options.carrier
            if wanted == "auto" and not _may_open(length, comm):
                wanted = "messages"
            self._places[length] = choose(comm, length, one_each(comm.size), wanted, measure=False).buffers

    def aggregate(self, gradient: np.ndarray, comm: Comm, out: np.ndarray) -> np.ndarray:
        """As in `Aggregator`."""
        places = self._places.get(gradient.size) if gradient.dtype == np.float32 else None
        place = places()[0] if places is not None else out
        if place is not gradient:
            np.copyto(place, gradient)
        return comm.allreduce_terms([place], one_each(comm.size), place).array


class Automatic(Aggregator):
    """Default of `model.fit`: `FixedOrder` in a shared window if possible, else `Allreduce`.

    A window that all ranks of the job share; where they span nodes, or shared memory has no room, the
    transport's own sum. It depends on ranks and sizes alone, not on measured times, so that every run of a
    job has the same bits.
    """

    name = "auto"

    def __init__(self) -> None:
        super().__init__()
        self._ordered = FixedOrder()
        self._in_window: dict[int, bool] = {}

    def setup(self, shapes: Sequence[tuple[int, ...]], comm: Comm) -> None:
        """As in `Aggregator`."""
        length = elements_of(shapes)
        if length in self._in_window:
            return
        wanted = comm.size > 1 and _may_open(length, comm) and comm.nodes() == 1
        self._in_window[length] = wanted and comm.term_buffers(length, one_each(comm.size)) is not None
        if self._in_window[length]:
            self._ordered.setup(shapes, comm)

    def aggregate(self, gradient: np.ndarray, comm: Comm, out: np.ndarray) -> np.ndarray:
        """As in `Aggregator`."""
        if self._in_window.get(gradient.size) and gradient.dtype == np.float32:
            return self._ordered.aggregate(gradient, comm, out)
        return _summed_by_transport(gradient, comm, out)


def _may_open(length: int, comm: Comm) -> bool:
    """Whether a window for gradients of this length may be opened, and remember that; alike on all ranks."""
    opened = _opened.setdefault(comm, set())
    if len(opened) < MOST_WINDOWS:
        opened.add(length)
    return length in opened


def _in_window() -> Aggregator:
    return FixedOrder(carrier="window")


# The only list of names.
AGGREGATORS: Mapping[str, Callable[[], Aggregator]] = {
    "auto": Automatic,
    "allreduce": Allreduce,
    "fixed-order": FixedOrder,
    "window": _in_window,
    **COMPRESSORS,
}


def aggregator_of(wanted: Aggregator | str) -> Aggregator:
    """The aggregator for an argument.

    Args:
        wanted: itself, or its name.

    Raises:
        UsageError: there is none of this name, or another optimizer has the object already.
    """
    if isinstance(wanted, Aggregator):
        if wanted.taken:
            raise UsageError(f"aggregator {wanted} has been given to an optimizer: make a new one for each")
        return wanted
    if isinstance(wanted, str) and wanted in AGGREGATORS:
        return AGGREGATORS[wanted]()
    near = did_you_mean(wanted, list(AGGREGATORS)) if isinstance(wanted, str) else ""
    raise UsageError(
        f"aggregator is {wanted!r}: choose one of {', '.join(AGGREGATORS)}, or an object such as "
        f"tf_dist.aggregators.PowerSGD(rank=4){near}"
    )
