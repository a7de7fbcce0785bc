"""The global norm of a gradient whose parts are on the ranks that share a model."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from tf_dist.parallel.flat_buffer import FlatLayout
from tf_dist.parallel.global_norm import GlobalNorm, SquaredRun
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.sharding import part_of
from tf_dist.runners.replica import FlatParameters


def whole_norm(replica: FlatParameters, trainable: Sequence[Any], mesh: Mesh) -> GlobalNorm:
    """Build the global norm of a gradient that is sharded over `Mesh.model`; a collective.

    Args:
        replica: this rank's trainable variables.
        trainable: the trainable variables of the full model, in order.
        mesh: all ranks. Weights on several ranks of ``mesh.model`` count on the first of them.

    Returns:
        The norm, to be called with this rank's gradient, or its shard of it if it updates only that.
    """
    layout = FlatLayout([part_of(variable).whole for variable in trainable])
    number = {id(variable): place for place, variable in enumerate(trainable)}
    parts = [part_of(variable) for variable in replica.variables]
    mine: list[Any] = [[number[id(v)], part.pairs] for v, part in zip(replica.variables, parts, strict=True)]
    first: dict[str, int] = {}
    for rank, theirs in enumerate(mesh.model.allgather_obj(mine)):
        for held in theirs:
            first.setdefault(str(held), rank)
    runs: list[SquaredRun] = []
    for held, part, start in zip(mine, parts, replica.layout.starts[:-1], strict=True):
        if first[str(held)] == mesh.model.rank:
            whole = layout.starts[held[0]] if part.ranges is None else None
            _append(runs, SquaredRun(start, prod(part.shape), whole))
    shard = replica.own_shard
    if shard is None:
        return GlobalNorm(mesh.model, runs, layout.total)
    return GlobalNorm(mesh.all, [_inside(run, shard) for run in runs], layout.total)


def _inside(run: SquaredRun, shard: slice) -> SquaredRun:
    """The part of a run inside a shard, relative to the start of the shard; may be empty."""
    start, stop = max(run.start, shard.start), min(run.start + run.size, shard.stop)
    whole = None if run.whole is None else run.whole + start - run.start
    return SquaredRun(start - shard.start, max(0, stop - start), whole)


def _append(runs: list[SquaredRun], run: SquaredRun) -> None:
    """Append a run, merged with the previous one if they are contiguous in both."""
    if runs:
        start, size, whole = runs[-1]
        if whole is not None and (start + size, whole + size) == (run.start, run.whole):
            runs[-1] = SquaredRun(start, size + run.size, whole)
            return
    runs.append(run)
