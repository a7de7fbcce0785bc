"""A strategy, set up without a model, and steps of it with given gradients."""

from types import SimpleNamespace

from tf_dist.parallel.mesh import Mesh
from tf_dist.strategies.base import StepRequest


def set_up(strategy, comm, replica, micro_batches, count):
    """The strategy on a rank with these micro-batches, of ``count``."""
    strategy.setup(
        SimpleNamespace(
            mesh=Mesh(comm), replica=replica, optimizer=None, micro_batches=micro_batches, count=count,
            measure=False,
        )
    )  # fmt: skip
    return strategy


def take_step(strategy, terms, order, totals, clip_norm, replica, mesh, step=0, limit=0):
    """One step whose gradients are there already."""
    return strategy.step(
        StepRequest(step, limit, lambda: terms, None, order, totals, clip_norm, replica, mesh)
    )
