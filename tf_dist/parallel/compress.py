"""Gradient compression with error feedback: bfloat16, signs, top-k, PowerSGD.

What a rank could not send is its residual, which is added to its next gradient (Seide et al. 2014;
Karimireddy et al. 2019), so that updates are delayed, but not lost:

    a_r = g_r + e_r;   s_r = compressed a_r;   e_r = a_r - s_r;   every rank steps with sum_r s_r

g_r is this rank's part of the mean gradient: of `Trainer`, its sum divided by the tokens of all ranks.

Legend: P parameters, R ranks, k elements that are sent, r the rank of a matrix (in linear algebra).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.options import option
from tf_dist.parallel.aggregator import Aggregator, elements_of
from tf_dist.parallel.bf16_allreduce import allreduce_bfloat16
from tf_dist.parallel.flat_buffer import FlatLayout, aligned_empty
from tf_dist.parallel.onebit_allreduce import allreduce_signs
from tf_dist.parallel.reduction_tree import one_each

GROUP = "compression"
# Sample size from which top-k's threshold is estimated, as a fraction and at least.
SAMPLED, SAMPLED_AT_LEAST = 0.01, 10_000
# How many times k elements may exceed the threshold before they are truncated.
TOO_MANY = 1.3


class Compressor(Aggregator):
    """Sums gradients over ranks in a smaller form, and remembers what was not sent.

    Attributes:
        residual: e, (P,) float32, this rank's own.
    """

    exact = by_horovod = False
    residual: np.ndarray

    def setup(self, shapes: Sequence[tuple[int, ...]], comm: Comm) -> None:
        """As in `Aggregator`."""
        self.residual = np.zeros(elements_of(shapes), np.float32)

    def aggregate(self, gradient: np.ndarray, comm: Comm, out: np.ndarray) -> np.ndarray:
        """As in `Aggregator`, float32: the sum of what all ranks send of gradients and of what was left."""
        np.add(gradient, self.residual, out=out)
        return self._sum(out, comm)

    @abstractmethod
    def _sum(self, wanted: np.ndarray, comm: Comm) -> np.ndarray:
        """The sum of the compressed ``wanted``; sets ``residual`` to the rest of it."""

    def local_state(self) -> dict[str, np.ndarray]:
        """State of each rank, (P,) each: a checkpoint stores the sum over ranks."""
        return {"residual": self.residual}

    def replicated_state(self) -> dict[str, np.ndarray]:
        """State replicated on all ranks, of any shape: a checkpoint stores it unchanged."""
        return {}


class BFloat16(Compressor):
    """Half of the bytes. The owner of a slice keeps the rounding error of its sum."""

    name = "bf16"

    def _sum(self, wanted: np.ndarray, comm: Comm) -> np.ndarray:
        np.copyto(self.residual, wanted)
        allreduce_bfloat16(comm, wanted, self.residual)
        return wanted


class OneBit(Compressor):
    """Signs, and a magnitude per block: 1/32 of the bytes."""

    name, of_momentum = "onebit", True

    def _sum(self, wanted: np.ndarray, comm: Comm) -> np.ndarray:
        allreduce_signs(comm, wanted, self.residual)
        return wanted


@dataclass(frozen=True)
class TopKOptions:
    """Options of top-k. density: k / P. momentum: of each rank's own gradients; 0: plain error feedback."""

    density: float = option(
        0.01,
        GROUP,
        "fraction of the elements that topk sends",
        least=0,
        flag="compression_density",
    )
    momentum: float = option(
        0.0,
        GROUP,
        "local momentum of gradients before topk (DGC); use it with optimizer sgd",
        least=0,
        flag="compression_momentum",
    )


class TopK(Compressor):
    """Top-k: the elements that have grown largest, with their indices: 8 k (R - 1) bytes from each rank.

    With momentum it is Deep Gradient Compression (Lin et al. 2018): each rank keeps the momentum of its own
    gradients, and clears it for elements that were sent. The optimizer should then be plain SGD.

    Raises:
        UsageError: k would be zero or more than P; or the momentum never decays.
    """

    name, Options = "topk", TopKOptions

    def __init__(self, options: TopKOptions | None = None, **given: Any) -> None:
        super().__init__(options, **given)
        self.density: float = self.options.density
        self.factor = np.float32(self.options.momentum)
        if not 0 < self.density <= 1:
            raise UsageError(f"compression_density is {self.density:g}: a share above 0, at most 1; use 0.01")
        if self.factor >= 1:
            raise UsageError(f"compression_momentum is {self.factor:g}: it must be below 1")

    def setup(self, shapes: Sequence[tuple[int, ...]], comm: Comm) -> None:
        """As in `Aggregator`."""
        super().setup(shapes, comm)
        self.velocity = np.zeros(self.residual.size if self.factor else 0, np.float32)

    def aggregate(self, gradient: np.ndarray, comm: Comm, out: np.ndarray) -> np.ndarray:
        """As in `Compressor`."""
        if self.velocity.size:
            self.velocity *= self.factor
            self.velocity += gradient
            gradient = self.velocity
        return super().aggregate(gradient, comm, out)

    def _sum(self, wanted: np.ndarray, comm: Comm) -> np.ndarray:
        places = largest(wanted, max(1, round(self.density * wanted.size)))
        values = wanted[places]
        np.copyto(self.residual, wanted)
        self.residual[places] = 0.0
        if self.velocity.size:
            self.velocity[places] = 0.0
        wanted.fill(0.0)
        for theirs, found in gathered(comm, places, values):
            wanted[theirs] += found
        return wanted

    def local_state(self) -> dict[str, np.ndarray]:
        """As in `Compressor`."""
        more = {"velocity": self.velocity} if self.velocity.size else {}
        return super().local_state() | more


def largest(array: np.ndarray, count: int) -> np.ndarray:
    """Indices, ascending int32, of about ``count`` elements with the largest magnitude.

    The threshold is estimated from a sample (as in Lin et al. 2018), since sorting all would take longer than
    sending them; if too many exceed it, these are sorted. All of them if ``count`` is their number.
    """
    if count >= array.size:
        return np.arange(array.size, dtype=np.int32)
    magnitudes = np.abs(array)
    sampled = min(array.size, max(SAMPLED_AT_LEAST, int(SAMPLED * array.size)))
    sample = magnitudes[:: max(1, array.size // sampled)]
    rank = min(sample.size - 1, max(0, sample.size - round(count / array.size * sample.size)))
    found = np.flatnonzero(magnitudes >= np.partition(sample, rank)[rank])
    if found.size > TOO_MANY * count or not found.size:
        among = found if found.size else np.arange(array.size)
        cut = among.size - count
        found = np.sort(among[np.argpartition(magnitudes[among], cut)[cut:]])
    return found.astype(np.int32)


def gathered(comm: Comm, places: np.ndarray, values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """All-gather indices and values, in rank order; a collective."""
    counts = comm.allgather_obj(int(places.size))
    ends = np.cumsum(counts)
    parts = [slice(int(end) - count, int(end)) for end, count in zip(ends, counts, strict=True)]
    all_places, all_values = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
    all_places[parts[comm.rank]], all_values[parts[comm.rank]] = places, values
    comm.allgather(all_places, parts)
    comm.allgather(all_values, parts)
    return [(all_places[part], all_values[part]) for part in parts]


class _Matrix(NamedTuple):
    """A weight as a matrix: its position in the flat array, and its shape."""

    part: slice
    rows: int
    columns: int


@dataclass(frozen=True)
class PowerSGDOptions:
    """Options of PowerSGD. rank: r. least_rate: least compression ratio of a matrix."""

    rank: int = option(4, GROUP, "rank of the powersgd factors", least=1, flag="compression_rank")
    least_rate: float = option(
        2.0,
        GROUP,
        "minimum compression ratio of a matrix for powersgd; else it is sent uncompressed",
        least=1,
        flag="compression_least_rate",
    )


class PowerSGD(Compressor):
    """Each matrix as a product of two narrow ones (Vogels, Karimireddy & Jaggi 2019).

    One step of power iteration, warm-started with the right factor of the last step: P = sum_r M_r Q,
    orthogonalized; Q_r = M_r' P; every rank steps with P (sum_r Q_r)', and rank r has sent P Q_r'. A matrix
    of n x m is sent as r (n + m) numbers. Vectors, and matrices that would not become ``least_rate`` times
    smaller, are sent uncompressed.

    Attributes:
        seed: of the first Q.
    """

    name, Options, by_horovod = "powersgd", PowerSGDOptions, True
    seed = 1

    def setup(self, shapes: Sequence[tuple[int, ...]], comm: Comm) -> None:
        """As in `Aggregator`."""
        super().setup(shapes, comm)
        rank, least_rate = self.options.rank, self.options.least_rate
        layout = FlatLayout(list(shapes))
        self.rank: int = rank
        self._matrices: list[_Matrix] = []
        self._whole: list[slice] = []
        for start, size, shape in zip(layout.starts[:-1], layout.sizes, layout.shapes, strict=True):
            part = slice(start, start + size)
            rows = shape[0] if len(shape) > 1 else 1
            columns = prod(shape) // max(rows, 1)
            saves = min(rows, columns) > rank and size >= least_rate * rank * (rows + columns)
            if len(shape) > 1 and saves:
                self._matrices.append(_Matrix(part, rows, columns))
            else:
                self._whole.append(part)
        random = np.random.default_rng([self.seed, rank])
        self._left = aligned_empty(rank * sum(one.rows for one in self._matrices))
        self.right = random.standard_normal(rank * sum(one.columns for one in self._matrices), np.float32)
        self._longest_side = max([min(one[0], prod(one[1:])) for one in shapes if len(one) > 1], default=0)

    def check_smaller(self) -> None:
        """As in `Aggregator`."""
        if not self.right.size:
            raise UsageError(
                f"compression_rank {self.rank}: no weight would become {self.options.least_rate:g} times "
                f"smaller; no matrix has sides of more than {self._longest_side}. Use a lower rank, or no "
                "compression"
            )

    @property
    def ratio(self) -> float:
        """Compression ratio: how many times fewer numbers are sent."""
        whole = sum(part.stop - part.start for part in self._whole)
        return float(self.residual.size / max(1, self._left.size + self.right.size + whole))

    def _sum(self, wanted: np.ndarray, comm: Comm) -> np.ndarray:
        order = one_each(comm.size)
        lefts, rights = self._views(self._left, "rows"), self._views(self.right, "columns")
        matrices = [wanted[one.part].reshape(one.rows, one.columns) for one in self._matrices]
        for matrix, left, right in zip(matrices, lefts, rights, strict=True):
            np.matmul(matrix, right, out=left)
        travels = np.concatenate([self._left, *(wanted[part] for part in self._whole)])
        travels = comm.allreduce_terms([travels], order, travels).array
        np.copyto(self._left, travels[: self._left.size])
        for left in lefts:
            left[:] = np.linalg.qr(left)[0]
        for matrix, left, right in zip(matrices, lefts, rights, strict=True):
            np.matmul(matrix.T, left, out=right)
        own = self.right.copy()
        summed = comm.allreduce_terms([self.right], order, self.right).array
        np.copyto(self.right, summed)
        everyone = zip(self._matrices, matrices, lefts, self._views(own, "columns"), rights, strict=True)
        for one, matrix, left, sent, right in everyone:
            residual = self.residual[one.part].reshape(one.rows, one.columns)
            np.subtract(matrix, left @ sent.T, out=residual)
            np.matmul(left, right.T, out=matrix)
        start = self._left.size
        for part in self._whole:
            stop = start + part.stop - part.start
            wanted[part], self.residual[part] = travels[start:stop], 0.0
            start = stop
        return wanted

    def _views(self, flat: np.ndarray, side: str) -> list[np.ndarray]:
        """The narrow matrices of one side, as views of a flat array."""
        views, start = [], 0
        for one in self._matrices:
            length = getattr(one, side)
            views.append(flat[start : start + length * self.rank].reshape(length, self.rank))
            start += length * self.rank
        return views

    def replicated_state(self) -> dict[str, np.ndarray]:
        """As in `Compressor`."""
        return {"right": self.right}


# By name. Each is created from its options, and set up once the shapes of the weights are known.
COMPRESSORS: dict[str, type[Compressor]] = {one.name: one for one in (BFloat16, TopK, PowerSGD, OneBit)}
