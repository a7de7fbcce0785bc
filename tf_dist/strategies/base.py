"""What a strategy is: how gradients of all ranks become new weights, and what others may rely on.

A strategy is one class in one file. It declares its options, claims `Traits`, and takes steps; the rest of
the program asks for traits and calls verbs, and knows no strategy by name. A new one overrides `step`, and
whatever else is not as here.

No TensorFlow: what a strategy has of the model is a `Replica`, flat float32 arrays of P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from tf_dist.comm.sums import Order
from tf_dist.errors import UsageError
from tf_dist.options import Configured
from tf_dist.options import option as option
from tf_dist.parallel.mesh import DATA, Mesh
from tf_dist.parallel.totals import Replica, Totals
from tf_dist.partition import share


@dataclass(frozen=True)
class Traits:
    """What the rest of the program may rely on; tests/mpi/test_strategy_contract_mpi.py checks each claim.

    Attributes:
        replicas_equal: all ranks hold the same weights after every step.
        global_losses: `Totals` are those of all ranks after every step; else each rank knows its own alone,
            until `Strategy.synchronize`.
        lockstep: all ranks end a step together.
        sums_gradients: some or all steps sum whole gradients over all ranks, so that it pays to find out
            what carries them best.
        optimizer_on_root: rank 0 of the replicas alone has the optimizer that counts.
        sharding: what is divided among data-parallel ranks, as the stages of ZeRO count: 0 nothing, 1 the
            optimizer's state, 2 also gradients, 3 also weights.
        atomic_step: a step whose gradient is not finite leaves all state untouched on every rank, and
            returns the norm, so that it can be skipped, or taken again.
        finishes_without_dead: the ranks that live can finish a step, whoever has died in it.
        overlaps: gradients may leave during the backward pass.
    """

    replicas_equal: bool = True
    global_losses: bool = True
    lockstep: bool = True
    sums_gradients: bool = True
    optimizer_on_root: bool = False
    sharding: int = 0
    atomic_step: bool = False
    finishes_without_dead: bool = False
    overlaps: bool = False


class Setting(NamedTuple):
    """What a strategy is to work in, so far as it is known.

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
    """What a strategy finds on its rank: given to `Strategy.setup`.

    Attributes:
        mesh: all ranks.
        replica: this rank's model and optimizer, as flat arrays.
        optimizer: the Keras optimizer itself.
        micro_batches: numbers of those of a step that are this rank's.
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
        """What sets the learning rate before a step of the optimizer, by a step and a factor."""

    def frozen_adam(self) -> Callable[[int], Any]:
        """What makes, of Adam after so many steps, a `tf_dist.strategies.compressed.MomentumStep`.

        Raises:
            UsageError: the optimizer is not Adam.
        """


@dataclass
class StepRequest:
    """One step, as a strategy is asked to take it.

    Attributes:
        step: optimizer steps taken so far.
        limit: the step after which somebody looks at the model of all ranks, at the earliest.
        gradients: computes the gradients of this rank's micro-batches, fills its ``totals``, and returns its
            terms of their sum, (P,) float32 each, which may be used up.
        batches: makes micro-batches of a step, by number: (number, x_BxT, y_BxT) each.
        order: in which the terms of all replicas are added.
        totals: of this rank; a strategy with ``global_losses`` makes them those of all.
        clip_norm: largest global norm of the mean gradient; 0 for no clipping.
        replica: what this rank has of model and optimizer.
        mesh: all ranks.
    """

    step: int
    limit: int
    gradients: Callable[[], list[np.ndarray]]
    batches: Callable[[int, range], Sequence[Any]]
    order: Order
    totals: Totals
    clip_norm: float
    replica: Replica
    mesh: Mesh


class StateArray(NamedTuple):
    """An array that a strategy remembers from step to step, and a checkpoint keeps.

    per_weight: it has a number for each parameter, (P,). alike: it is the same on all ranks; else rank 0's
    is kept, which has everything after `Strategy.consolidate`.
    """

    name: str
    array: np.ndarray
    per_weight: bool = True
    alike: bool = True


class Report(NamedTuple):
    """What a strategy has cost: a heading and a line for people; facts for a file of this name, if any."""

    heading: str
    text: str
    file: str = ""
    facts: Mapping[str, Any] = {}


def steps_between(default: int) -> Any:
    """The option of strategies whose ranks step by themselves between exchanges."""
    text = "local steps between synchronizations"
    return option(default, "local SGD and DiLoCo", text, least=1)


class Strategy(Configured):
    """How gradients of all ranks become new weights.

    Attributes:
        traits: what others may rely on; of an object, where its options decide.
        context: what it was set up with.
    """

    traits: Traits = Traits()
    context: Context

    # Before the first step ------------------------------------------------------------------------

    def check(self, setting: Setting) -> None:
        """Refuse what this strategy cannot work in; without ranks, as flags are checked.

        Raises:
            UsageError: with the reason, and what would do.
        """

    def assignment(self, count: int, mesh: Mesh) -> range:
        """The micro-batches of a step, of ``count``, that are this rank's."""
        return share(count, mesh.at[DATA], mesh.shape[DATA])

    def setup(self, context: Context) -> None:
        """Get ready for the first step; a collective.

        Raises:
            UsageError: model or optimizer do not fit.
        """
        if hasattr(self, "context"):
            raise UsageError(f"strategy {self} has been given to a Trainer: make a new one for each")
        self.context = context

    def describe(self) -> str:
        """A line for people about how it sums; nothing where it sums gradients as they are."""
        return ""

    @property
    def weight_copies(self) -> int:
        """Arrays as large as the weights that every rank keeps beside them, for a forecast of memory."""
        return 0

    # Steps ----------------------------------------------------------------------------------------

    def step(self, request: StepRequest) -> float:
        """Take a step, or the part of it that is this rank's; a collective where it is in lockstep.

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

    def settle(self, replica: Replica) -> None:
        """Wait until nothing of this rank's is under way; before `synchronize`, of which others may die."""

    def synchronize(self, replica: Replica, mesh: Mesh) -> None:
        """Let all ranks go on from the same weights: somebody looks at the model. A collective."""

    def sum_over_ranks(self, sums: np.ndarray) -> None:
        """Replace this rank's sums over its steps by those of all ranks, in place; a collective.

        Only of a strategy without ``global_losses``, after `synchronize`.
        """

    # What it remembers ----------------------------------------------------------------------------

    def state(self) -> Iterable[StateArray]:
        """The arrays that it remembers from step to step, always in the same order."""
        return ()

    def consolidate(self) -> None:
        """Leave nothing that a checkpoint could not keep, after `synchronize`; a collective.

        A checkpoint knows no ranks. So that a run that goes on from it and one that was never stopped are the
        same, both go on from here.
        """

    def regroup(self, micro_batches: range) -> None:
        """Go on without ranks that have died, and with other micro-batches of this rank."""
        self.context.micro_batches = micro_batches

    def report(self) -> Report | None:
        """What it has cost so far, on rank 0; None where there is nothing to say."""
        return None
