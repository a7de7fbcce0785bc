"""`CachedForward` with ZeRO stage 3: the weights of each segment are gathered for each call.

Legend: B rows, N new positions of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tf_dist.models.incremental import IncrementalModel
from tf_dist.runners.cached_forward import CachedSegment, select
from tf_dist.zero.sharded_replica import ShardedReplica


class CachedSegments:
    """`tf_dist.decoding.forward.CachedForward` of a model whose weights are shared by data-parallel ranks.

    Caches are not shared: each rank computes all rows.

    Args:
        replica: this rank's shard, with its segments.
        gather: all-gathers the weights of a segment, valid until the next call.

    Raises:
        NotIncremental: on every rank: a layer does not say how it is computed for new positions only.
    """

    lockstep = True

    def __init__(self, replica: ShardedReplica, segments: Any, gather: Callable[[int], list[Any]]) -> None:
        whole = IncrementalModel(replica.model)
        whole.refuse_parts()
        self.segments = [
            CachedSegment(one.model, at == len(segments) - 1, [replica.variables[i] for i in one.numbers])
            for at, one in enumerate(segments)
        ]
        self._gather = gather
        self.limit, self.longest = replica.seq_len if whole.bounded else None, replica.seq_len

    def begin(self, batch: int, length: int) -> list[Any]:
        """As in `CachedForward`."""
        return [segment.begin(batch, length) for segment in self.segments]

    def __call__(
        self, x_BxN: np.ndarray, start_B: np.ndarray, count_B: np.ndarray, state: list[Any]
    ) -> tuple[np.ndarray, list[Any]]:
        """As in `CachedForward`; a collective of the data-parallel ranks as well."""
        out: Any = x_BxN
        after = []
        for at, (segment, caches) in enumerate(zip(self.segments, state, strict=True)):
            out, caches = segment(out, start_B, count_B, caches, self._gather(at))
            after.append(caches)
        return np.asarray(out), after

    def select(self, state: list[Any], rows: np.ndarray) -> list[Any]:
        """As in `CachedForward`."""
        return [select(caches, rows) for caches in state]
