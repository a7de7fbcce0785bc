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

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from tf_dist.comm.sums import Order
from tf_dist.config import default
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.short import allreduce_bfloat16
from tf_dist.parallel.tree import one_each
from tf_dist.parallel.updates import TOKENS, Replica, Totals, allreduce, own_sum, scale_of


@dataclass(frozen=True)
class Plan:
    """When replicas meet and what they do then; names are those of `tf_dist.config.Config`.

    Attributes:
        sync_every: H, steps between meetings of the same weights; 0, of a Trainer: what is usual.
        sync_warmup_steps: synchronous steps, each with the sum of all gradients, before the first local one
            (post-local SGD, Lin et al. 2020).
        outer_lr: eta.
        outer_momentum: mu.
        outer_fragments: F, parts of the weights that have meetings of their own.
        outer_precision: in which outer gradients travel, "float32" or "bfloat16".
        outer_delay: T, steps that replicas take while a fragment's outer gradients travel.
    """

    sync_every: int = default("sync_every")
    sync_warmup_steps: int = default("sync_warmup_steps")
    outer_lr: float = default("outer_lr")
    outer_momentum: float = default("outer_momentum")
    outer_fragments: int = default("outer_fragments")
    outer_precision: str = default("outer_precision")
    outer_delay: int = default("outer_delay")

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


@dataclass
class LocalSteps:
    """The update of local SGD and DiLoCo; an `Update` with a memory.

    Attributes:
        plan: when and how replicas meet.
        parameters: P, of this rank.
        micro_batches: numbers of those of a step that are this replica's.
        step: optimizer steps taken so far; to be set where a run goes on.
        momentum: b, (P,) float32, the same on all replicas; empty without momentum.
        together: whether all replicas hold the same weights now.
        state_together: whether their optimizers have the same state now.
        meetings: how many fragments have met so far.
    """

    plan: Plan
    parameters: int
    micro_batches: range
    step: int = 0
    momentum: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    together: bool = True
    state_together: bool = True
    meetings: int = 0

    def __post_init__(self) -> None:
        if self.plan.outer_momentum:
            self.momentum = np.zeros(self.parameters, np.float32)
        count = self.plan.outer_fragments
        cuts = [self.parameters * i // count for i in range(count + 1)]
        self._fragments = [_Fragment(slice(cuts[i], cuts[i + 1])) for i in range(count)]
        self._anchor = np.empty(0, np.float32)
        self._away: _Away | None = None

    def __call__(
        self,
        terms: list[np.ndarray],
        order: Order,
        totals: Totals,
        clip_norm: float,
        replica: Replica,
        mesh: Mesh,
    ) -> float:
        """Take a step of one's own, and meet the others where it is time.

        Arguments and errors are those of `tf_dist.parallel.updates.allreduce`. ``clip_norm`` holds for the
        gradient of each replica.

        Returns:
            The norm of the gradient before clipping: the mean over replicas, weighed by tokens.
        """
        self.step += 1
        if self.step <= self.plan.sync_warmup_steps:
            return allreduce(terms, order, totals, clip_norm, replica, mesh)
        if self.together:
            self._depart(replica)
        length = self._step_alone(terms, totals, clip_norm, replica, mesh)
        due = [one for i, one in enumerate(self._fragments) if self.plan.due(i, self.step)]
        if self._away is not None and self.step == self._away.step + self.plan.outer_delay:
            self._arrive(replica, mesh)
        if not self.plan.outer_delay:
            self._meet(due, replica, mesh)
        elif due:
            self._leave(due[0], replica, mesh)
        return length

    @property
    def first_whole(self) -> bool:
        """Whether gradients of the first steps are summed over all ranks."""
        return self.plan.sync_warmup_steps > 0

    @property
    def travels(self) -> bool:
        """Whether changes of weights are under way."""
        return self._away is not None

    @property
    def said(self) -> str:
        """A line for people."""
        plan = self.plan
        first = f"after {plan.sync_warmup_steps} synchronous ones, " if plan.sync_warmup_steps else ""
        parts = f", in {plan.outer_fragments} parts by turns" if plan.outer_fragments > 1 else ""
        short = f", in {plan.outer_precision}" if plan.outer_precision != "float32" else ""
        steps = f"{plan.sync_every} step{'s' * (plan.sync_every > 1)}"
        delay = f"; they travel during {plan.outer_delay} more" if plan.outer_delay else ""
        return f"{first}weights of all ranks meet every {steps}{parts}{short}{delay}"

    def meet(self, replica: Replica, mesh: Mesh) -> None:
        """Let all replicas go on from the same weights, ahead of time if need be; a collective."""
        if self._away is not None:
            self._arrive(replica, mesh)
        if not self.together:
            self._meet(self._fragments, replica, mesh)

    def _depart(self, replica: Replica) -> None:
        """Remember the weights that all replicas hold."""
        if not self._anchor.size:
            self._anchor = aligned_empty(self.parameters)
        replica.read_weights(self._anchor)
        self.together = self.state_together = False

    def _step_alone(
        self, terms: list[np.ndarray], totals: Totals, clip_norm: float, replica: Replica, mesh: Mesh
    ) -> float:
        gradient = own_sum(terms, self.parameters)
        mesh.all.barrier()  # waiting for slower ranks is counted apart from moving bytes
        counts = totals.reduce(mesh.all)
        mine = totals.of(self.micro_batches)
        gradient = replica.complete(gradient)
        norm = replica.norm(gradient) / max(mine[TOKENS], 1.0)
        # Every rank of `Mesh.model` knows the norm, and gives its part of it.
        share = mine[TOKENS] / max(counts[TOKENS], 1.0) / mesh.model.size
        lengths = np.array([norm * share])
        mesh.all.allreduce(lengths)
        scale_of(float(lengths[0]), counts, 0.0)  # not finite on one is a failure of all
        replica.apply(gradient, scale_of(norm, mine, clip_norm))
        for one in self._fragments:
            one.mine += mine[TOKENS]
            one.all += counts[TOKENS]
        return float(lengths[0])

    def _meet(self, fragments: list[_Fragment], replica: Replica, mesh: Mesh) -> None:
        """An outer step of some fragments; a collective of the replicas."""
        if not fragments:
            return
        weights = aligned_empty(self.parameters)
        replica.read_weights(weights)
        for one in fragments:
            self._outer_step(one, weights[one.part], mesh)
        replica.write_weights(weights)
        self.meetings += len(fragments)
        self.together = len(fragments) == len(self._fragments)

    def _outer_step(self, one: _Fragment, weights: np.ndarray, mesh: Mesh) -> None:
        """Turn this replica's weights of a fragment into those of all."""
        change = self._changed(one, weights)
        if self.plan.outer_precision == "bfloat16":
            allreduce_bfloat16(mesh.replicas, change)
        else:
            change = mesh.replicas.allreduce_terms([change], one_each(mesh.replicas.size), change).array
        np.copyto(weights, self._stepped(one, change))

    def _leave(self, one: _Fragment, replica: Replica, mesh: Mesh) -> None:
        """Let a fragment's outer gradients travel; a collective of the replicas."""
        weights, comm = aligned_empty(self.parameters), mesh.replicas
        replica.read_weights(weights)
        left = weights[one.part].copy()
        change = self._changed(one, left)
        by = comm.overlapped(change.size, one_each(comm.size), shared=False)
        if by is not None and not by.begun:  # by another Trainer
            by.begin([change])
            by.ready(slice(0, change.size))
        self._away = _Away(one, change, left, self.step)

    def _arrive(self, replica: Replica, mesh: Mesh) -> None:
        """Take the outer step of the fragment that has travelled; a collective of the replicas."""
        assert self._away is not None
        (one, change, left, _), comm = self._away, mesh.replicas
        total = comm.allreduce_terms([change], one_each(comm.size), change).array
        weights = aligned_empty(self.parameters)
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
        plan = self.plan
        if plan.outer_momentum:
            momentum = self.momentum[one.part]
            momentum *= np.float32(plan.outer_momentum)
            momentum += change
            change += np.float32(plan.outer_momentum) * momentum
        anchor -= np.float32(plan.outer_lr) * change
        return anchor
