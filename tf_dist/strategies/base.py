"""Interface of strategies: how gradients of all ranks become new weights, with traits for their callers.

A strategy is one class in one file. It declares its options and `Traits`, and takes steps; the rest of
the program queries traits and calls methods, and knows no strategy by name. A new one overrides `step`, and
other methods as needed.

No TensorFlow: a strategy sees the model as a `GradientReplica`, flat float32 arrays of P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from tf_dist.comm.transport.reduction_order import ReductionOrder
from tf_dist.errors import UsageError
from tf_dist.options import Configured
from tf_dist.options import option as option
from tf_dist.parallel.mesh import DATA, Mesh
from tf_dist.parallel.totals import GradientReplica, Totals
from tf_dist.partition import share


@dataclass(frozen=True)
class Traits:
    """Guarantees for the rest of the program; tests/mpi/test_strategy_contract_mpi.py checks each claim.

    Attributes:
        replicas_equal: all ranks hold the same weights after every step.
        global_losses: `Totals` are those of all ranks after every step; else losses are local,
            until `Strategy.synchronize`.
        lockstep: all ranks end a step together.
        sums_gradients: some or all steps all-reduce full gradients, so that tuning the transport
            pays.
        optimizer_on_root: only rank 0 of the replicas has a valid optimizer state.
        sharding: what is sharded among data-parallel ranks, as in the stages of ZeRO: 0 nothing, 1 the
            optimizer's state, 2 also gradients, 3 also weights.
        atomic_step: a step whose gradient is not finite leaves all state unchanged on every rank, and
            returns the norm, so that it can be skipped, or repeated.
        survives_failures: the surviving ranks can finish a step in which a rank failed.
        overlaps: gradients may be reduced during the backward pass.
    """

    replicas_equal: bool = True
    global_losses: bool = True
    lockstep: bool = True
    sums_gradients: bool = True
    optimizer_on_root: bool = False
    sharding: int = 0
    atomic_step: bool = False
    survives_failures: bool = False
    overlaps: bool = False


class Setting(NamedTuple):
    """Known facts about a strategy's environment.

    shared: degrees of parallelism above 1, by the names of their flags. backend: empty: not known.
    optimizer: its Keras name in lower case; empty: not known.
    """

    shared: Mapping[str, int] = {}
    backend: str = ""
    optimizer: str = ""

    @property
    def degrees(self) -> str:
        """The degrees above 1, as in ``tensor_parallel 2``."""
        return " and ".join(f"{name} {degree}" for name, degree in self.shared.items())


class Context(Protocol):
    """A strategy's view of its rank: argument of `Strategy.setup`.

    Attributes:
        mesh: all ranks.
        replica: this rank's model and optimizer, as flat arrays.
        optimizer: the Keras optimizer itself.
        micro_batches: indices of this rank's micro-batches of a step.
        count: micro-batches of a step, of all ranks.
        measure: whether sums may be timed.
    """

    mesh: Mesh
    replica: Any
    optimizer: Any
    micro_batches: range
    count: int
    measure: bool

    def learning_rate_setter(self) -> Callable[[int, float], None]:
        """A function that sets the learning rate before an optimizer step, from a step and a factor."""

    def frozen_adam(self) -> Callable[[int], Any]:
        """A function from a number of steps to a `tf_dist.strategies.compressed.MomentumStep` of this Adam.

        Raises:
            UsageError: the optimizer is not Adam.
        """


@dataclass
class StepRequest:
    """Arguments of one step.

    Attributes:
        step: optimizer steps taken so far.
        limit: the earliest step after which the model of all ranks is evaluated or saved.
        gradients: computes the gradients of this rank's micro-batches, fills its ``totals``, and returns its
            terms of their sum, (P,) float32 each, which may be overwritten.
        batches: creates micro-batches of a step, by index: (index, x_BxT, y_BxT) each.
        order: reduction order of the terms of all replicas.
        totals: of this rank; a strategy with ``global_losses`` reduces them over all.
        clip_norm: largest global norm of the mean gradient; 0 for no clipping.
        replica: this rank's part of model and optimizer.
        mesh: all ranks.
    """

    step: int
    limit: int
    gradients: Callable[[], list[np.ndarray]]
    batches: Callable[[int, range], Sequence[Any]]
    order: ReductionOrder
    totals: Totals
    clip_norm: float
    replica: GradientReplica
    mesh: Mesh


class StateArray(NamedTuple):
    """An array of a strategy's state, stored in checkpoints.

    per_weight: it has a number for each parameter, (P,). alike: it is the same on all ranks; else rank 0's
    is stored, which is complete after `Strategy.consolidate`.
    """

    name: str
    array: np.ndarray
    per_weight: bool = True
    alike: bool = True


class Report(NamedTuple):
    """Statistics of a strategy: a heading and a text; facts for a file of this name, if any."""

    heading: str
    text: str
    file: str = ""
    facts: Mapping[str, Any] = {}


def steps_between(default: int) -> Any:
    """The option of strategies with local steps between exchanges."""
    text = "local steps between synchronizations"
    return option(default, "local SGD and DiLoCo", text, least=1)


class Strategy(Configured):
    """Base class of strategies: how gradients of all ranks become new weights.

    Attributes:
        traits: guarantees; set per object if its options decide.
        context: from `setup`.
    """

    traits: Traits = Traits()
    context: Context

    # Before the first step ------------------------------------------------------------------------

    def check(self, setting: Setting) -> None:
        """Refuse an unsupported environment; without communication, when flags are checked.

        Raises:
            UsageError: with the reason, and an alternative.
        """

    def assignment(self, count: int, mesh: Mesh) -> range:
        """The micro-batches of this rank, of ``count`` in a step."""
        return share(count, mesh.at[DATA], mesh.shape[DATA])

    def setup(self, context: Context) -> None:
        """Prepare for the first step; a collective.

        Raises:
            UsageError: on every rank: model or optimizer are not supported.
        """
        if hasattr(self, "context"):
            raise UsageError(f"strategy {self} has been given to a Trainer: make a new one for each")
        self.context = context

    def describe(self) -> str:
        """Status line about how it reduces; empty if it reduces gradients unchanged."""
        return ""

    @property
    def weight_copies(self) -> int:
        """Arrays as large as the weights that every rank keeps besides them, for the memory estimate."""
        return 0

    # Steps ----------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> float:
        """Take a step, or this rank's part of it; a collective if in lockstep.

        Returns:
            The norm of the mean gradient before clipping.

        Raises:
            NumericError: the gradient is not finite, and the strategy has no ``atomic_step``.
        """
        raise NotImplementedError(f"strategy {self} takes no steps")

    @property
    def in_sync(self) -> bool:
        """Whether all ranks hold the same weights now."""
        return True

    def settle(self, replica: GradientReplica) -> None:
        """Wait until this rank has no messages in flight; before `synchronize`, in which others may fail."""

    def synchronize(self, replica: GradientReplica, mesh: Mesh) -> None:
        """Make all ranks continue from the same weights, for evaluation or a checkpoint. A collective."""

    def sum_over_ranks(self, sums: np.ndarray) -> None:
        """Replace this rank's sums over its steps by those of all ranks, in place; a collective.

        Only for a strategy without ``global_losses``, after `synchronize`.
        """

    # State ----------------------------------------------------------------------------------------

    def state(self) -> Iterable[StateArray]:
        """The arrays of its state, always in the same order."""
        return ()

    def consolidate(self) -> None:
        """Reduce its state to what a checkpoint can store, after `synchronize`; a collective.

        A checkpoint does not depend on ranks. So that a resumed run equals an uninterrupted one, both
        continue from here.
        """

    def regroup(self, micro_batches: range) -> None:
        """Continue without failed ranks, and with other micro-batches of this rank."""
        self.context.micro_batches = micro_batches

    def report(self) -> Report | None:
        """Statistics so far, on rank 0; None if there are none."""
        return None
