"""Local steps: each replica trains by itself, and all meet now and then (local SGD, DiLoCo).

A replica takes H optimizer steps with the gradients of its own micro-batches. What it has changed since the
last meeting is its *outer gradient*; the mean of these over all replicas is given to a second optimizer:

    d_r = w - w_r                               w where they met last, w_r where replica r is now
    g   = sum_r (n_r / n) d_r                   n_r tokens that r has seen since, n those of all
    b  <- mu b + g;  w <- w - eta (g + mu b)    SGD with Nesterov's momentum; everyone goes on from the new w

With eta = 1 and mu = 0 that is the mean of the weights: local SGD (Stich 2019; McMahan et al. 2017 weigh by
samples as well). With AdamW inside and momentum outside it is DiLoCo (Douillard et al. 2023). With H = 1 and
plain SGD inside, local SGD is synchronous SGD, but for rounding: the tokens are weighed alike.

Gradients stay at home, so that a rank sends 1 / H of the bytes of an allreduce. A few numbers still cross in
every step: losses, tokens, and whether somebody wants to stop. They are summed before the step, so that a
gradient that is not a number stops all ranks before a weight has changed.

Meetings can be spread: with F fragments each F-th part of the weights has meetings of its own, H / F steps
after those of the part before (Streaming DiLoCo, Douillard et al. 2025).

And nobody need wait for a meeting. With a delay of T steps the changes travel while replicas take T more
steps; then each goes on from the common weights and what it has done meanwhile (delayed averaging, Zhou et
al. 2020, where Streaming DiLoCo mixes the two by halves):

    w_r  <-  w + (w_r - w_r')                   w_r' where replica r was when its change left

By steps and not by the clock: a run has the same bits however long the network takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tf_dist.errors import UsageError
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.short import allreduce_bfloat16
from tf_dist.parallel.totals import TOKENS, Replica, own_sum, scale_of
from tf_dist.parallel.tree import one_each
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
# Takes the first steps, where some are to be synchronous.
SYNCHRONOUS = AllReduce()


@dataclass(frozen=True)
class LocalSGDOptions:
    """When replicas meet.

    Attributes:
        sync_every: H, steps between meetings of the same weights.
        sync_warmup_steps: synchronous steps, each with the sum of all gradients, before the first local one
            (post-local SGD, Lin et al. 2020).
        outer_fragments: F, parts of the weights that have meetings of their own.
        outer_precision: in which outer gradients travel, "float32" or "bfloat16".
        outer_delay: T, steps that replicas take while a fragment's outer gradients travel.
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
        """Whether a fragment has a meeting after a step, which is counted from 1."""
        offset = fragment * self.sync_every // self.outer_fragments
        return (step - self.sync_warmup_steps - offset) % self.sync_every == 0


@dataclass
class _Fragment:
    """A part of the flat weights: where it lies, and the tokens seen since its last meeting."""

    part: slice
    mine: float = 0.0
    all: float = 0.0


class _Away(NamedTuple):
    """A fragment whose outer gradients travel; left: this replica's weights when they left, and the step."""

    fragment: _Fragment
    change: np.ndarray
    left: np.ndarray
    step: int


class LocalSGD(Drifting):
    """Local SGD: replicas take steps of their own, and go on from the mean of their weights.

    Attributes:
        plan: when replicas meet, its options.
        outer_lr: eta. outer_momentum: mu.
        momentum: b, (P,) float32, the same on all replicas; empty without momentum.
        meetings: how many fragments have met so far.
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
        self._anchor = np.empty(0, np.float32)
        self._away: _Away | None = None

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
        """The weights with which replicas met, and the outer momentum."""
        return 1 + (self.outer_momentum > 0)

    def step(self, request: StepRequest) -> float:
        """Take a step of one's own, and meet the others where it is time.

        ``clip_norm`` holds for the gradient of each replica.

        Returns:
            The norm of the gradient before clipping: the mean over replicas, weighed by tokens.

        Raises:
            NumericError: on every rank: a gradient is not finite, and no weight has changed.
        """
        number, replica, mesh = request.step + 1, request.replica, request.mesh
        if number <= self.plan.sync_warmup_steps:
            return SYNCHRONOUS.step(request)
        terms = request.gradients()
        if self._together:
            self._depart(replica)
        length = self._step_alone(terms, request)
        due = [one for i, one in enumerate(self._fragments) if self.plan.due(i, number)]
        if self._away is not None and number == self._away.step + self.plan.outer_delay:
            self._arrive(replica, mesh)
        if not self.plan.outer_delay:
            self._meet(due, replica, mesh)
        elif due:
            self._leave(due[0], number, replica, mesh)
        return length

    @property
    def travels(self) -> bool:
        """Whether changes of weights are under way."""
        return self._away is not None

    def synchronize(self, replica: Replica, mesh: Mesh) -> None:
        """Let all replicas go on from the same weights, ahead of time if need be; a collective."""
        if self._away is not None:
            self._arrive(replica, mesh)
        if not self._together:
            self._meet(self._fragments, replica, mesh)

    def state(self) -> list[StateArray]:
        """As in `Strategy`."""
        return [StateArray("momentum", self.momentum)] if self.momentum.size else []

    def _depart(self, replica: Replica) -> None:
        """Remember the weights that all replicas hold."""
        if not self._anchor.size:
            self._anchor = aligned_empty(replica.parameters)
        replica.read_weights(self._anchor)
        self._part()

    def _step_alone(self, terms: list[np.ndarray], request: StepRequest) -> float:
        replica, totals, mesh = request.replica, request.totals, request.mesh
        gradient = own_sum(terms, replica.parameters)
        mesh.all.barrier()  # waiting for slower ranks is counted apart from moving bytes
        counts = totals.reduce(mesh.all)
        mine = totals.of(self.context.micro_batches)
        gradient = replica.complete(gradient)
        norm = replica.norm(gradient) / max(mine[TOKENS], 1.0)
        # Every rank of `Mesh.model` knows the norm, and gives its part of it.
        share = mine[TOKENS] / max(counts[TOKENS], 1.0) / mesh.model.size
        lengths = np.array([norm * share])
        mesh.all.allreduce(lengths)
        scale_of(float(lengths[0]), counts, 0.0)  # not finite on one is a failure of all
        replica.apply(gradient, scale_of(norm, mine, request.clip_norm))
        for one in self._fragments:
            one.mine += mine[TOKENS]
            one.all += counts[TOKENS]
        return float(lengths[0])

    def _meet(self, fragments: list[_Fragment], replica: Replica, mesh: Mesh) -> None:
        """An outer step of some fragments; a collective of the replicas."""
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
        """Turn this replica's weights of a fragment into those of all."""
        change = self._changed(one, weights)
        if self.plan.outer_precision == "bfloat16":
            allreduce_bfloat16(mesh.replicas, change)
        else:
            change = mesh.replicas.allreduce_terms([change], one_each(mesh.replicas.size), change).array
        np.copyto(weights, self._stepped(one, change))

    def _leave(self, one: _Fragment, number: int, replica: Replica, mesh: Mesh) -> None:
        """Let a fragment's outer gradients travel; a collective of the replicas."""
        weights, comm = aligned_empty(replica.parameters), mesh.replicas
        replica.read_weights(weights)
        left = weights[one.part].copy()
        change = self._changed(one, left)
        by = comm.overlapped(change.size, one_each(comm.size), shared=False)
        if by is not None and not by.begun:  # by another Trainer
            by.begin([change])
            by.ready(slice(0, change.size))
        self._away = _Away(one, change, left, number)

    def _arrive(self, replica: Replica, mesh: Mesh) -> None:
        """Take the outer step of the fragment that has travelled; a collective of the replicas."""
        assert self._away is not None
        (one, change, left, _), comm = self._away, mesh.replicas
        total = comm.allreduce_terms([change], one_each(comm.size), change).array
        weights = aligned_empty(replica.parameters)
        replica.read_weights(weights)
        weights[one.part] += self._stepped(one, total) - left
        replica.write_weights(weights)
        self._away, self.meetings = None, self.meetings + 1

    def _changed(self, one: _Fragment, weights: np.ndarray) -> np.ndarray:
        """What this replica adds to a fragment's outer gradient; tokens are counted anew from here on."""
        change: np.ndarray = self._anchor[one.part] - weights
        change *= np.float32(one.mine / max(one.all, 1.0))
        one.mine = one.all = 0.0
        return change

    def _stepped(self, one: _Fragment, change: np.ndarray) -> np.ndarray:
        """The weights of a fragment after an outer step with the outer gradient of all, which is used up."""
        anchor: np.ndarray = self._anchor[one.part]
        if self.outer_momentum:
            momentum = self.momentum[one.part]
            momentum *= np.float32(self.outer_momentum)
            momentum += change
            change += np.float32(self.outer_momentum) * momentum
        anchor -= np.float32(self.outer_lr) * change
        return anchor


def check_fragments(plan: LocalSGDOptions) -> None:
    """Refuse parts of the weights, and steps during which they travel, that do not fit between meetings.

    Raises:
        UsageError: with the reason, and what would do.
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
