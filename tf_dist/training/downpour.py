"""Downpour: workers push gradients to a master and pull weights, each when it is ready.

Rank 0 is the master. It deals out *units* of a global batch (`tf_dist.parallel.dealing`), applies each
gradient as it comes, and answers with new weights and the next unit (Dean et al. 2012). Nobody waits for the
slowest, but for the bound of `--staleness S`. With S = 0 the gradients of a batch are collected, added in the
order of the tree and applied as one: that is `--update allreduce`, bit for bit, with the work shared out as
ranks are ready.

Of every rank a step of the Trainer is a global batch: it ends where the master has told the rank that the
batch is done, with its losses. So all ranks log the same numbers, each as soon as it hears of them.

    worker                                    master
    ready, or (unit, gradient, losses)  --->  apply, or collect; is a batch done?
    (unit, weights), done, losses       <---  as soon as a unit may be begun, or the worker's batch is done

Legend: P parameters, S staleness, n micro-batches of a unit.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.base import Pending, add_in_order, named
from tf_dist.errors import LaunchError
from tf_dist.parallel.dealing import Dealer, Unit
from tf_dist.parallel.flat import aligned_empty
from tf_dist.parallel.mesh import Mesh
from tf_dist.parallel.short import one_each
from tf_dist.parallel.tree import BlockSum
from tf_dist.parallel.updates import TOKENS, Totals, scale_of
from tf_dist.training.passes import MicroBatch
from tf_dist.training.replica import Replica

# Of messages to and from the master.
PUSH_TAG, GRADIENT_TAG, REPLY_TAG, WEIGHTS_TAG = 700, 701, 702, 703
# Between two looks of a master that has nothing to do.
LOOK_EVERY_S = 0.00005
# How long the master waits for a worker that has a unit, while no other sends anything.
PATIENCE_S = 600.0

Batches = Callable[[int, range], list[MicroBatch]]


@dataclass(frozen=True)
class Asynchrony:
    """How workers and master deal with each other; names are those of `tf_dist.config.Config`.

    Attributes:
        staleness: S, global batches by which the fastest may lead the slowest.
        staleness_aware: "on": a gradient's learning rate is divided by its staleness, the number of updates
            since the weights that it was computed with (Zhang et al. 2016); "off": it is multiplied by the
            unit's share of the global batch, so that a batch moves the weights as far as a synchronous step.
        master_trains: "on": rank 0 takes units as well, and looks after the others between micro-batches;
            with update easgd it trains like them.
        elastic_force: of update easgd; 0: 0.9 / workers, as in Zhang et al. (2015).
    """

    staleness: int = 1
    staleness_aware: str = "off"
    master_trains: str = "off"
    elastic_force: float = 0.0


class Result(NamedTuple):
    """Of a global batch: loss, tokens, right guesses and whether to stop, (4,); and the gradient's norm."""

    counts: np.ndarray
    norm: float


@dataclass
class Load:
    """What the master did. staleness: how many gradients were how stale; updates: optimizer steps.

    busy_s: seconds of applying and of copying weights; served_s: of looking after workers in all.
    """

    staleness: Counter[int] = field(default_factory=Counter)
    updates: int = 0
    busy_s: float = 0.0
    served_s: float = 0.0

    def report(self) -> dict[str, Any]:
        """For a file: the histogram, updates per second of service, and the share of it that was work."""
        served = max(self.served_s, 1e-9)
        return {
            "staleness": {str(stale): count for stale, count in sorted(self.staleness.items())},
            "updates": self.updates,
            "updates_per_s": self.updates / served,
            "master_load": self.busy_s / served,
        }


class Downpour:
    """The update of a rank, master or worker.

    Args:
        replica: of this rank; the master's optimizer is the one that counts.
        mesh: all ranks, along data alone.
        micro_batches: of a global batch.
        size: n, micro-batches of a unit.
        options: how it is done.

    Attributes:
        step: global batches done so far, to be set before each.
        together: whether all ranks hold the master's weights.
        load: of the master.
    """

    def __init__(
        self, replica: Replica, mesh: Mesh, micro_batches: int, size: int, options: Asynchrony
    ) -> None:
        self.replica, self.comm, self.options = replica, mesh.all, options
        self.micro_batches, self.size, self.units = micro_batches, size, micro_batches // size
        self.step, self.together, self.load = 0, True, Load()
        kind = Master if mesh.all.rank == 0 else Worker
        # Of so many batches a worker may not have heard: S that were done before its unit was dealt out, its
        # own, and S whose units others have done meanwhile.
        self.told = 2 * options.staleness + 1
        self._part: Master | Worker = kind(self)

    @property
    def said(self) -> str:
        """A line for people."""
        bound, unit = self.options.staleness, f"{self.size} micro-batch{'es' * (self.size > 1)}"
        lead = f"at most {bound} global batch{'es' * (bound > 1)} ahead" if bound else "one batch at a time"
        return f"a master deals out units of {unit}, {lead}"

    @property
    def cost(self) -> str:
        """What the master has done so far, for a person."""
        report = self.load.report()
        mean = sum(stale * count for stale, count in self.load.staleness.items()) / max(1, self.load.updates)
        return (
            f"{report['updates_per_s']:.1f} updates/s, busy {100 * report['master_load']:.0f} % of the time, "
            f"gradients {mean:.1f} updates old on average"
        )

    def take(self, batches: Batches, totals: Totals, clip_norm: float, limit: int) -> float:
        """Do this rank's part of a global batch.

        Args:
            batches: makes the micro-batches of a step that are asked for, by number.
            totals: takes the sums of the whole batch, on every rank, and knows whether this one wants to
                stop.
            clip_norm: largest norm of the mean gradient that is applied at once; 0 for no clipping.
            limit: the step before which all ranks will meet: nothing of it is begun.

        Returns:
            The norm of the mean gradient, over several the mean of their norms, weighed by tokens.

        Raises:
            NumericError: on the master: a gradient is not finite, and has not been applied.
            LaunchError: on the master: a worker is not heard of.
        """
        self.together = False
        result = self._part.take(self.step, batches, totals.stop_wanted, clip_norm, max(limit, self.step + 1))
        totals.set(result.counts)
        self.step += 1
        return result.norm

    def meet(self, replica: Any, mesh: Mesh) -> None:
        """Give all ranks the master's weights; a collective."""
        if not self.together:
            self.replica.give_weights(mesh.all)
            self.together = True
            if isinstance(self._part, Master):
                self._part.renew()

    def set_rates(self, rate: Callable[[int, float], None]) -> None:
        """Let the master call ``rate(step, factor)`` before each of its optimizer's steps."""
        if isinstance(self._part, Master):
            self._part.rate = rate

    def gradient(self, unit: Unit, batches: Batches, sums: BlockSum, between: Callable[[], None]) -> Work:
        """Compute a unit, and look elsewhere between its micro-batches."""
        numbers = range(unit.number * self.size, (unit.number + 1) * self.size)
        rows = np.zeros((self.size, 3))
        for row, (number, x_BxT, y_BxT) in zip(rows, batches(unit.step, numbers), strict=True):
            gradient, row[:] = self.replica.gradients(x_BxT, y_BxT, (unit.step, number))
            sums.add(gradient)
            between()
        (gradient,) = sums.terms()
        return Work(unit, gradient, rows)

    def block_sum(self) -> BlockSum:
        """Adds the gradients of a unit, in the order of its subtree."""
        leaves = range(self.size)
        return BlockSum(self.replica.parameters, leaves, leaves)


class Work(NamedTuple):
    """A unit, its summed gradient (P,), and of its micro-batches loss, tokens and right guesses, (n, 3).

    version: of the weights that it was computed with. stop: whether whoever did it wants to stop.
    """

    unit: Unit
    gradient: np.ndarray
    rows: np.ndarray
    version: int = 0
    stop: bool = False


# Messages: float64, in which whole numbers up to 2 ** 53 are exact.
PUSH = ("has_work", "step", "number", "version", "stop", "clock")
REPLY = ("has_unit", "step", "number", "version")
# Of each batch that a reply tells of: its step, counts (4) and norm.
TOLD = 6


class Worker:
    """A rank that computes units. Arguments: the update of this rank."""

    def __init__(self, update: Downpour) -> None:
        self._update, self._comm = update, update.comm
        self._sums = update.block_sum()
        self._unit: Unit | None = None
        self._version = -1
        self._results: dict[int, Result] = {}
        self._weights = aligned_empty(update.replica.parameters)

    def take(self, clock: int, batches: Batches, stop: bool, clip_norm: float, limit: int) -> Result:
        """As in `Downpour.take`: work until the batch is known to be done."""
        while clock not in self._results:
            work = None
            if self._unit is not None:
                work = self._update.gradient(self._unit, batches, self._sums, _nothing)
            self._push(work, stop, clock)
            self._hear()
        return self._results.pop(clock)

    def _push(self, work: Work | None, stop: bool, clock: int) -> None:
        unit = work.unit if work else Unit(0, 0)
        head = np.array([work is not None, *unit, self._version, stop, clock], np.float64)
        rows = work.rows if work else np.zeros((self._update.size, 3))
        sends = [self._comm.isend(np.concatenate([head, rows.reshape(-1)]), 0, PUSH_TAG)]
        if work:
            sends.append(self._comm.isend(work.gradient, 0, GRADIENT_TAG))
        for one in sends:
            one.wait()

    def _hear(self) -> None:
        """Take the master's answer: results, and perhaps a unit with weights."""
        told = self._update.told
        answer = np.empty(len(REPLY) + TOLD * told)
        self._comm.irecv(answer, 0, REPLY_TAG).wait()
        reply = dict(zip(REPLY, answer, strict=False))
        for step, *counts, norm in answer[len(REPLY) :].reshape(told, TOLD):
            if step >= 0:
                self._results.setdefault(int(step), Result(np.array(counts), float(norm)))
        self._unit = None
        if reply["has_unit"]:
            self._unit = Unit(int(reply["step"]), int(reply["number"]))
            if reply["version"] != self._version:
                self._comm.irecv(self._weights, 0, WEIGHTS_TAG).wait()
                self._update.replica.write_weights(self._weights)
                self._version = int(reply["version"])


@dataclass
class _Peer:
    """What the master knows of a worker.

    head, gradient: where its next message comes, and the requests. unit: what it computes. version: of the
    weights it has. clock: the batch whose end it waits for; None where it does not wait. told: all batches
    before it are known to be done.
    """

    rank: int
    head: np.ndarray
    gradient: np.ndarray
    coming: Pending | None = None
    work: Pending | None = None
    unit: Unit | None = None
    version: int = -1
    clock: int | None = None
    told: int = 0
    sends: list[Pending] = field(default_factory=list)


class Master:
    """Rank 0: deals out units, takes gradients, steps. Arguments: the update of this rank."""

    def __init__(self, update: Downpour) -> None:
        self._update, self._comm, self._load = update, update.comm, update.load
        self._replica, options = update.replica, update.options
        self._trains = options.master_trains == "on" or update.comm.size == 1
        self._sums = update.block_sum()
        self._dealer = Dealer(update.units, options.staleness)
        length = len(PUSH) + 3 * update.size
        self._peers = [
            _Peer(rank, np.empty(length), aligned_empty(self._replica.parameters))
            for rank in range(1, update.comm.size)
        ]
        self._waiting: deque[_Peer] = deque()
        self._version, self._snapshot_version, self._snapshot = 0, -1, np.empty(0, np.float32)
        self._totals: dict[int, Totals] = {}
        self._norms: dict[int, list[tuple[float, float]]] = {}
        self._collected: dict[int, dict[int, np.ndarray]] = {}
        self._results: dict[int, Result] = {}
        self._stop_at: int | None = None
        self._clip_norm, self._limit, self._heard = 0.0, 0, time.monotonic()
        self.rate: Callable[[int, float], None] = lambda step, factor: None

    def take(self, clock: int, batches: Batches, stop: bool, clip_norm: float, limit: int) -> Result:
        """As in `Downpour.take`: look after all until the batch is done."""
        begun = time.monotonic()
        if self._dealer.done < clock:  # a run goes on
            self._dealer = Dealer(self._update.units, self._update.options.staleness, clock)
        if self._stop_at is not None and clock >= self._stop_at:
            self._stop_at = None  # it is over
        self._clip_norm, self._heard = clip_norm, begun
        self._limit = limit if self._stop_at is None else min(limit, self._stop_at)
        self._wish_to_stop(stop)
        for peer in self._peers:
            self._listen(peer)
        while self._dealer.done <= clock:
            unit = self._dealer.deal(self._limit) if self._trains and not self._waiting else None
            if unit is not None:
                self._accept(self._own(unit, batches))
            else:
                self._look_or_wait()
            self._answer()
        while clock + 1 >= self._limit and any(peer.told <= clock for peer in self._peers):
            self._look_or_wait()  # whoever has had no unit of the last batch waits for its result
            self._answer()
        self._load.served_s += time.monotonic() - begun
        self.rate(clock + 1, 1.0)
        return self._results[clock]

    def renew(self) -> None:
        """Begin anew after all have met."""
        # Whoever looks at the model may change it: nobody has these weights. And all agree whether to stop.
        self._version += 1
        self._stop_at = None

    # Listening -------------------------------------------------------------------------------------

    def _listen(self, peer: _Peer) -> None:
        """Let a worker's next message come, where it is not on its way.

        Nothing comes, before all have met, from one that has no unit and knows all results; a receive that
        was posted for it would take the message of another trainer.
        """
        if peer.coming is None and peer.clock is None and (peer.unit or peer.told < self._limit):
            peer.coming = self._comm.irecv(peer.head, peer.rank, PUSH_TAG)
            if peer.unit is not None:
                peer.work = self._comm.irecv(peer.gradient, peer.rank, GRADIENT_TAG)

    def _look(self) -> bool:
        """Take what has come from whom; whether there was anything."""
        came = [peer for peer in self._peers if peer.coming is not None and peer.coming.done()]
        for peer in came:
            assert peer.coming is not None
            peer.coming.wait()
            peer.coming, self._heard = None, time.monotonic()
            push = dict(zip(PUSH, peer.head, strict=False))
            peer.clock = int(push["clock"])
            self._wish_to_stop(bool(push["stop"]))
            if push["has_work"]:
                assert peer.unit is not None and peer.work is not None
                peer.work.wait()
                rows = peer.head[len(PUSH) :].reshape(-1, 3)
                unit, peer.unit, peer.work = peer.unit, None, None
                self._accept(Work(unit, peer.gradient, rows, int(push["version"])))
            self._waiting.append(peer)
        return bool(came)

    def _look_or_wait(self) -> None:
        if self._look():
            return
        time.sleep(LOOK_EVERY_S)
        if time.monotonic() - self._heard > PATIENCE_S:
            missing = [peer.rank for peer in self._peers if peer.clock is None]
            raise LaunchError(
                f"{named(missing)} {'has' if len(missing) == 1 else 'have'} sent the master nothing for "
                f"{PATIENCE_S:.0f} s, in batch {self._dealer.done}. Is a rank stopped, or a link down?"
            )

    def _own(self, unit: Unit, batches: Batches) -> Work:
        version = self._version
        return self._update.gradient(unit, batches, self._sums, self._between)._replace(version=version)

    def _between(self) -> None:
        """Look after workers while the master is at a unit of its own."""
        if self._peers:
            self._look()
            self._answer()

    # Gradients -------------------------------------------------------------------------------------

    def _accept(self, work: Work) -> None:
        """Apply a gradient, or keep it until its batch is complete."""
        begun = time.monotonic()
        step, number = work.unit
        totals = self._totals.setdefault(step, Totals(self._update.micro_batches))
        for row, sums in enumerate(work.rows):
            totals.add(number * self._update.size + row, sums)
        if self._update.options.staleness == 0:
            kept = self._collected.setdefault(step, {})
            kept[number] = work.gradient.copy()
            if len(kept) == self._update.units:
                self._apply_batch(step, [kept[i] for i in range(len(kept))])
                del self._collected[step]
        else:
            self._apply_unit(work)
        before = self._dealer.done
        self._dealer.finish(work.unit)
        for done in range(before, self._dealer.done):
            self._conclude(done)
        self._load.busy_s += time.monotonic() - begun

    def _apply_batch(self, step: int, gradients: list[np.ndarray]) -> None:
        """One synchronous step."""
        counts = self._totals[step].sum()
        total = add_in_order(gradients, one_each(len(gradients)).additions)
        norm = self._replica.norm(total) / max(counts[TOKENS], 1.0)
        self.rate(step, 1.0)
        self._step(total, scale_of(norm, counts, self._clip_norm), 0)
        self._norms[step] = [(norm, 1.0)]

    def _apply_unit(self, work: Work) -> None:
        counts = np.append(work.rows.sum(axis=0), 0.0)
        norm = self._replica.norm(work.gradient) / max(counts[TOKENS], 1.0)
        scale = scale_of(norm, counts, self._clip_norm)
        self._norms.setdefault(work.unit.step, []).append((norm, counts[TOKENS]))
        if counts[TOKENS]:
            stale = self._version - work.version
            aware = self._update.options.staleness_aware == "on"
            self.rate(work.unit.step, 1.0 / max(1, stale) if aware else 1.0 / self._update.units)
            self._step(work.gradient, scale, stale)

    def _step(self, gradient: np.ndarray, scale: float, stale: int) -> None:
        self._replica.apply(gradient, scale)
        self._version += 1
        self._load.updates += 1
        self._load.staleness[stale] += 1

    def _conclude(self, step: int) -> None:
        """Note what a batch that is done has come to."""
        counts, norms = self._totals.pop(step).sum(), self._norms.pop(step)
        counts[-1] = float(self._stop_at is not None and step == self._stop_at - 1)
        weight = sum(tokens for _, tokens in norms) or 1.0
        norm = sum(norm * tokens for norm, tokens in norms) / weight
        self._results[step] = Result(counts, norm)
        self._results.pop(step - self._update.told, None)

    def _wish_to_stop(self, wanted: bool) -> None:
        """Let all stop at the end of the last batch that anybody has begun."""
        if wanted and self._stop_at is None:
            self._stop_at = max(self._dealer.begun, self._dealer.done + 1)
            self._limit = min(self._limit, self._stop_at)

    # Answers ---------------------------------------------------------------------------------------

    def _answer(self) -> None:
        """Answer those who wait and can be given a unit, or whose batch is done."""
        for _ in range(len(self._waiting)):
            peer = self._waiting.popleft()
            assert peer.clock is not None
            unit = self._dealer.deal(self._limit)
            if unit is None and self._dealer.done <= peer.clock:
                self._waiting.append(peer)
                continue
            peer.unit, peer.clock = unit, None
            self._reply(peer)
            self._listen(peer)

    def _reply(self, peer: _Peer) -> None:
        begun = time.monotonic()
        told = [[step, *result.counts, result.norm] for step, result in sorted(self._results.items())]
        told += [[-1.0] * TOLD] * (self._update.told - len(told))
        unit = peer.unit or Unit(0, 0)
        head = [peer.unit is not None, *unit, self._version]
        for one in peer.sends:  # what he was told before: it has come, for he has answered
            one.wait()
        answer = np.array([*head, *np.ravel(told)], np.float64)
        peer.told = self._dealer.done
        peer.sends = [self._comm.isend(answer, peer.rank, REPLY_TAG)]
        if peer.unit is not None and peer.version != self._version:
            peer.sends.append(self._comm.isend(self._weights(), peer.rank, WEIGHTS_TAG))
            peer.version = self._version
        self._load.busy_s += time.monotonic() - begun

    def _weights(self) -> np.ndarray:
        """The weights of this version; a new array for each, for older ones may still be on their way."""
        if self._snapshot_version != self._version:
            self._snapshot = aligned_empty(self._replica.parameters)
            self._replica.read_weights(self._snapshot)
            self._snapshot_version = self._version
        return self._snapshot


def _nothing() -> None:
    pass
