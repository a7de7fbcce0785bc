"""Local SGD and DiLoCo: replicas take local steps, and synchronize periodically.

A replica takes H optimizer steps with the gradients of its own micro-batches. Its change since the last
synchronization is its *outer gradient*; the mean of these over all replicas goes to an outer optimizer:

    d_r = w - w_r                               w at the last synchronization, w_r of replica r now
    g   = sum_r (n_r / n) d_r                   n_r tokens that r has seen since, n those of all
    b  <- mu b + g;  w <- w - eta (g + mu b)    SGD with Nesterov momentum; all continue from the new w

With eta = 1 and mu = 0 that is the mean of the weights: local SGD (Stich 2019; McMahan et al. 2017 weigh by
samples as well). With AdamW inside and momentum outside it is DiLoCo (Douillard et al. 2023). With H = 1 and
plain SGD inside, local SGD is synchronous SGD, but for rounding: the tokens have equal weights.

Gradients are not communicated, so a rank sends 1 / H of the bytes of an all-reduce. A few numbers are still
reduced in every step: losses, tokens, and stop requests. That happens before the step, so that a non-finite
gradient stops all ranks before a weight has changed.

Synchronizations can be staggered: with F fragments each F-th part of the weights has its own, H / F steps
after those of the previous part (Streaming DiLoCo, Douillard et al. 2025).

And they can be asynchronous. With a delay of T steps outer gradients are in flight while replicas take T more
steps; then each continues from the synchronized weights plus its own change meanwhile (delayed averaging,
Zhou et al. 2020, where Streaming DiLoCo mixes the two by halves):

    w_r  <-  w + (w_r - w_r')                   w_r' of replica r when its outer gradient was sent

The delay is in steps and not in time: a run has the same bits however long the network takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.parallel.bf16_allreduce import allreduce_bfloat16
from tf_dist.parallel.flat_buffer import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.reduction_tree import one_each
from tf_dist.parallel.totals import TOKENS, GradientReplica, own_sum, scale_of
from tf_dist.strategies.allreduce import AllReduce
from tf_dist.strategies.base import (
    Context,
    Setting,
    StateArray,
    StepRequest,
    Traits,
    option,
    steps_between,
)
from tf_dist.strategies.drift import Drifting

GROUP = "local SGD and DiLoCo"
# Takes the first steps, if some are synchronous.
SYNCHRONOUS = AllReduce()
OuterSum = Callable[[np.ndarray, Comm], np.ndarray]


@dataclass(frozen=True)
class LocalSGDOptions:
    """When replicas synchronize.

    Attributes:
        sync_every: H, steps between synchronizations of the same weights.
        sync_warmup_steps: synchronous steps, each with the sum of all gradients, before the first local one
            (post-local SGD, Lin et al. 2020).
        outer_fragments: F, parts of the weights that are synchronized separately.
        outer_precision: of outer gradients in messages, "float32" or "bfloat16".
        outer_delay: T, steps that replicas take while a fragment's outer gradients are in flight.
    """

    sync_every: int = steps_between(8)
    sync_warmup_steps: int = option(0, GROUP, "synchronous steps before the first local step", least=0)
    outer_fragments: int = option(
        1,
        GROUP,
        "fragments of the weights, each synchronized at its own steps (streaming), so that less is sent at "
        "once",
        least=1,
    )
    outer_precision: str = option(
        "float32",
        GROUP,
        "precision in which outer gradients (weight changes) are sent",
        choices=("float32", "bfloat16"),
    )
    outer_delay: int = option(
        0,
        GROUP,
        "steps by which outer gradients are applied late, overlapping communication with compute",
        least=0,
    )

    def due(self, fragment: int, step: int) -> bool:
        """Whether a fragment is synchronized after a step, which is counted from 1."""
        offset = fragment * self.sync_every // self.outer_fragments
        return (step - self.sync_warmup_steps - offset) % self.sync_every == 0


@dataclass
class _Fragment:
    """A part of the flat weights: its slice, and the tokens seen since its last synchronization."""

    part: slice
    mine: float = 0.0
    all: float = 0.0


class _InFlight(NamedTuple):
    """A fragment in flight; left: this replica's weights when it was sent, and the step."""

    fragment: _Fragment
    change: np.ndarray
    left: np.ndarray
    step: int


class LocalSGD(Drifting):
    """Local SGD: replicas take local steps, and continue from the mean of their weights.

    Attributes:
        plan: when replicas synchronize, its options.
        outer_lr: eta. outer_momentum: mu.
        momentum: b, (P,) float32, the same on all replicas; empty without momentum.
        meetings: number of fragments synchronized so far.
        outer_sum: reduces the outer gradients of a synchronization: a function of this replica's term, which
            may be overwritten, and the replicas.
    """

    name, Options = "local-sgd", LocalSGDOptions
    outer_lr, outer_momentum = 1.0, 0.0

    def __init__(self, options: LocalSGDOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        self.plan = self.options
        check_fragments(self.plan)
        warm = self.plan.sync_warmup_steps > 0
        self.traits = Traits(replicas_equal=False, sums_gradients=warm)
        self.momentum = np.empty(0, np.float32)
        self.meetings = 0
        short = self.plan.outer_precision == "bfloat16"
        self.outer_sum: OuterSum = self.short_sum if short else self.plain_sum
        self._anchor = np.empty(0, np.float32)
        self._in_flight: _InFlight | None = None

    def check(self, setting: Setting) -> None:
        """As in `Strategy`."""
        if "sequence_parallel" in setting.shared:
            raise UsageError(
                f"sequence_parallel {setting.shared['sequence_parallel']} with strategy {self}, which needs "
                "ranks with rows of their own: ranks that share rows must sum their gradients in every step. "
                "Use sequence_parallel 1, or strategy allreduce"
            )
        if setting.backend == "horovod" and self.plan.outer_precision != "float32":
            raise UsageError(
                f"backend horovod cannot carry outer_precision {self.plan.outer_precision}: use backend mpi"
            )

    def setup(self, context: Context) -> None:
        """As in `Strategy`."""
        super().setup(context)
        size, count = context.replica.parameters, self.plan.outer_fragments
        if self.outer_momentum:
            self.momentum = np.zeros(size, np.float32)
        cuts = [size * i // count for i in range(count + 1)]
        self._fragments = [_Fragment(slice(cuts[i], cuts[i + 1])) for i in range(count)]

    def describe(self) -> str:
        """As in `Strategy`."""
        plan = self.plan
        first = f"after {plan.sync_warmup_steps} synchronous ones, " if plan.sync_warmup_steps else ""
        parts = f", in {plan.outer_fragments} parts by turns" if plan.outer_fragments > 1 else ""
        short = f", in {plan.outer_precision}" if plan.outer_precision != "float32" else ""
        steps = f"{plan.sync_every} step{'s' * (plan.sync_every > 1)}"
        delay = f"; they travel during {plan.outer_delay} more" if plan.outer_delay else ""
        return f"{first}weights of all ranks meet every {steps}{parts}{short}{delay}"

    @property
    def weight_copies(self) -> int:
        """The weights of the last synchronization, and the outer momentum."""
        return 1 + (self.outer_momentum > 0)

    def step(self, request: StepRequest) -> float:
        """Take a local step, and synchronize if it is due.

        ``clip_norm`` applies to the gradient of each replica.

        Returns:
            The norm of the gradient before clipping: the mean over replicas, weighted by tokens.

        Raises:
            NumericError: on every rank: a gradient is not finite, and no weight has changed.
        """
        number, replica, mesh = request.step + 1, request.replica, request.mesh
        if number <= self.plan.sync_warmup_steps:
            return SYNCHRONOUS.step(request)
        terms = request.gradients()
        if self._together:
            self._save_anchor(replica)
        length = self._step_alone(terms, request)
        due = [one for i, one in enumerate(self._fragments) if self.plan.due(i, number)]
        if self._in_flight is not None and number == self._in_flight.step + self.plan.outer_delay:
            self._finish_send(replica, mesh)
        if not self.plan.outer_delay:
            self._synchronize(due, replica, mesh)
        elif due:
            self._send(due[0], number, replica, mesh)
        return length

    @property
    def is_in_flight(self) -> bool:
        """Whether outer gradients are in flight."""
        return self._in_flight is not None

    def synchronize(self, replica: GradientReplica, mesh: Mesh) -> None:
        """Make all replicas continue from the same weights, ahead of time if needed; a collective."""
        if self._in_flight is not None:
            self._finish_send(replica, mesh)
        if not self._together:
            self._synchronize(self._fragments, replica, mesh)

    def state(self) -> list[StateArray]:
        """As in `Strategy`."""
        return [StateArray("momentum", self.momentum)] if self.momentum.size else []

    def _save_anchor(self, replica: GradientReplica) -> None:
        """Save the weights that all replicas hold."""
        if not self._anchor.size:
            self._anchor = aligned_empty(replica.parameters)
        replica.read_weights(self._anchor)
        self._part()

    def _step_alone(self, terms: list[np.ndarray], request: StepRequest) -> float:
        replica, totals, mesh = request.replica, request.totals, request.mesh
        gradient = own_sum(terms, replica.parameters)
        mesh.all.barrier()  # waiting for slower ranks is timed separately from communication
        counts = totals.reduce(mesh.all)
        mine = totals.of(self.context.micro_batches)
        gradient = replica.complete(gradient)
        norm = replica.norm(gradient) / max(mine[TOKENS], 1.0)
        # Every rank of `Mesh.model` knows the norm, and contributes its part of it.
        share = mine[TOKENS] / max(counts[TOKENS], 1.0) / mesh.model.size
        lengths = np.array([norm * share])
        mesh.all.allreduce(lengths)
        scale_of(float(lengths[0]), counts, 0.0)  # not finite on one rank: all fail
        replica.apply(gradient, scale_of(norm, mine, request.clip_norm))
        for one in self._fragments:
            one.mine += mine[TOKENS]
            one.all += counts[TOKENS]
        return float(lengths[0])

    def _synchronize(self, fragments: list[_Fragment], replica: GradientReplica, mesh: Mesh) -> None:
        """Synchronize some fragments by an outer step; a collective of the replicas."""
        if not fragments:
            return
        weights = aligned_empty(replica.parameters)
        replica.read_weights(weights)
        for one in fragments:
            self._outer_step(one, weights[one.part], mesh)
        replica.write_weights(weights)
        self.meetings += len(fragments)
        self._together = len(fragments) == len(self._fragments)

    def _outer_step(self, one: _Fragment, weights: np.ndarray, mesh: Mesh) -> None:
        """Replace this replica's weights of a fragment by the synchronized ones."""
        change = self._changed(one, weights)
        np.copyto(weights, self._stepped(one, self.outer_sum(change, mesh.replicas)))

    @staticmethod
    def plain_sum(change: np.ndarray, comm: Comm) -> np.ndarray:
        """The sum of all replicas' terms, in float32; a collective."""
        return comm.allreduce_terms([change], one_each(comm.size), change).array

    @staticmethod
    def short_sum(change: np.ndarray, comm: Comm) -> np.ndarray:
        """The same, sent as bfloat16."""
        allreduce_bfloat16(comm, change)
        return change

    def _send(self, one: _Fragment, number: int, replica: GradientReplica, mesh: Mesh) -> None:
        """Start to reduce a fragment's outer gradients; a collective of the replicas."""
        weights, comm = aligned_empty(replica.parameters), mesh.replicas
        replica.read_weights(weights)
        left = weights[one.part].copy()
        change = self._changed(one, left)
        by = comm.overlapped(change.size, one_each(comm.size), shared=False)
        if by is not None and not by.begun:  # else busy with another Trainer
            by.begin([change])
            by.ready(slice(0, change.size))
        self._in_flight = _InFlight(one, change, left, number)

    def _finish_send(self, replica: GradientReplica, mesh: Mesh) -> None:
        """Take the outer step of the fragment that was in flight; a collective of the replicas."""
        assert self._in_flight is not None
        (one, change, left, _), comm = self._in_flight, mesh.replicas
        total = comm.allreduce_terms([change], one_each(comm.size), change).array
        weights = aligned_empty(replica.parameters)
        replica.read_weights(weights)
        weights[one.part] += self._stepped(one, total) - left
        replica.write_weights(weights)
        self._in_flight, self.meetings = None, self.meetings + 1

    def _changed(self, one: _Fragment, weights: np.ndarray) -> np.ndarray:
        """The term of this replica in a fragment's outer gradient; resets the token count."""
        change: np.ndarray = self._anchor[one.part] - weights
        change *= np.float32(one.mine / max(one.all, 1.0))
        one.mine = one.all = 0.0
        return change

    def _stepped(self, one: _Fragment, change: np.ndarray) -> np.ndarray:
        """A fragment's weights after an outer step with the reduced outer gradient, which is overwritten."""
        anchor: np.ndarray = self._anchor[one.part]
        if self.outer_momentum:
            momentum = self.momentum[one.part]
            momentum *= np.float32(self.outer_momentum)
            momentum += change
            change += np.float32(self.outer_momentum) * momentum
        anchor -= np.float32(self.outer_lr) * change
        return anchor


def check_fragments(plan: LocalSGDOptions) -> None:
    """Refuse fragments and delays that do not fit between synchronizations.

    Raises:
        UsageError: with the reason, and an alternative.
    """
    every, fragments, delay = plan.sync_every, plan.outer_fragments, plan.outer_delay
    if fragments > every:
        raise UsageError(
            f"outer_fragments {fragments} is more than sync_every {every}: each part needs a step of its "
            f"own. Use at most {every} fragments"
        )
    if delay > every // fragments:
        raise UsageError(
            f"outer_delay {delay} is more than sync_every {every} / outer_fragments {fragments}: one part "
            f"must have arrived before the next one leaves. Use at most {every // fragments} steps"
        )
    if delay and plan.outer_precision != "float32":
        raise UsageError(
            f"outer_precision {plan.outer_precision} with outer_delay {delay}: what travels during other "
            "steps travels as float32. Leave one of them out"
        )
