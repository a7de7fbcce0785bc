"""Check that every rank is in `fit` before an optimizer is distributed implicitly: one rank may train alone.

A script may train a model on rank 0 only, while the others go on to something else: then `fit` must not wait
for them in a collective, where nobody knows why. So the ranks tell each other by messages that they are here,
and wait for a while.
"""

from __future__ import annotations

import time
from weakref import WeakSet

import numpy as np

from tf_dist.comm.transport.base import TAGS, Comm, Pending

TAG = TAGS - 2
# Ranks of one script come to `fit` within seconds of each other.
PATIENCE_S = 20.0
LOOK_EVERY_S = 0.005
# Where somebody has not come, messages are under way that nobody takes: it is not asked again.
_missed: WeakSet[Comm] = WeakSet()


def missing_ranks(comm: Comm) -> list[int]:
    """The ranks that have not come within `PATIENCE_S`; empty where all are here."""
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    if comm in _missed:
        return others
    here = np.ones(1, np.uint8)
    told = {rank: np.zeros(1, np.uint8) for rank in others}
    sent = [comm.isend(here, rank, TAG) for rank in others]
    awaited: dict[int, Pending] = {rank: comm.irecv(told[rank], rank, TAG) for rank in others}
    deadline = time.monotonic() + PATIENCE_S
    while awaited and time.monotonic() < deadline:
        awaited = {rank: pending for rank, pending in awaited.items() if not pending.done()}
        if awaited:
            time.sleep(LOOK_EVERY_S)
    if awaited:
        _missed.add(comm)
        return sorted(awaited)
    for pending in sent:
        pending.wait()
    return []
