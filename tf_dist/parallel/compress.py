"""Gradients that travel smaller than they are, with error feedback: bfloat16, signs, top-k, PowerSGD.

What a rank could not send stays with it and is added to its next gradient (Seide et al. 2014; Karimireddy et
al. 2019), so that nothing is lost, only late:

    a_r = g_r + e_r;   s_r = what is sent of a_r;   e_r = a_r - s_r;   everyone steps with sum_r s_r

g_r is this rank's part of the mean gradient: its sum divided by the tokens of all ranks.

Legend: P parameters, R ranks, k elements that are sent, r the rank of a matrix (of linear algebra).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np

from tf_dist.comm.base import Comm
from tf_dist.errors import UsageError
from tf_dist.options import Configured, option
from tf_dist.parallel.flat import FlatLayout, aligned_empty
from tf_dist.parallel.onebit import allreduce_signs
from tf_dist.parallel.short import allreduce_bfloat16
from tf_dist.parallel.tree import one_each

GROUP = "compression"
# Elements among which the threshold of top-k is looked for, as a share and at least.
SAMPLED, SAMPLED_AT_LEAST = 0.01, 10_000
# How many times as many elements as were wanted may pass the threshold before they are cut.
TOO_MANY = 1.3


class Compressor(Configured, ABC):
    """Sums gradients over ranks in a smaller form, and remembers what was not sent.

    Attributes:
        residual: e, (P,) float32, this rank's own.
        by_horovod: whether Horovod can carry it.
        of_momentum: it is to compress the momentum of Adam, which the ranks make together.
    """

    by_horovod = of_momentum = False
    residual: np.ndarray

    def setup(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Get ready for gradients of weights of such shapes."""
        self.residual = np.zeros(sum(prod(shape) for shape in shapes), np.float32)

    def check_worth(self) -> None:
        """Refuse to compress, after `setup`, where nothing would become smaller.

        Raises:
            UsageError: with what would do.
        """

    def sum(self, gradient: np.ndarray, comm: Comm) -> np.ndarray:
        """What all ranks have sent of their gradients and of what was left; a collective.

        Args:
            gradient: this rank's, (P,) float32; its content is lost.
            comm: the ranks.

        Returns:
            (P,) float32, the same bits on every rank, in memory that the next call uses again.
        """
        gradient += self.residual
        return self._sum(gradient, comm)

    @abstractmethod
    def _sum(self, wanted: np.ndarray, comm: Comm) -> np.ndarray:
        """The sum of what is sent of ``wanted``; sets ``residual`` to the rest of it."""

    def own_arrays(self) -> dict[str, np.ndarray]:
        """What each rank has for itself, (P,) each: a checkpoint keeps the sum over ranks."""
        return {"residual": self.residual}

    def common_arrays(self) -> dict[str, np.ndarray]:
        """What is the same on all ranks, of any shape: a checkpoint keeps it as it is."""
        return {}


class BFloat16(Compressor):
    """Half of the bytes. What the sum of a slice loses by its own rounding, its owner keeps."""

    name = "bf16"

    def _sum(self, wanted: np.ndarray, comm: Comm) -> np.ndarray:
        np.copyto(self.residual, wanted)
        allreduce_bfloat16(comm, wanted, self.residual)
        return wanted


class OneBit(Compressor):
    """Signs, and a magnitude for each block: a thirty-second of the bytes."""

    name, of_momentum = "onebit", True

    def _sum(self, wanted: np.ndarray, comm: Comm) -> np.ndarray:
        allreduce_signs(comm, wanted, self.residual)
        return wanted


@dataclass(frozen=True)
class TopKOptions:
    """What is sent. density: k / P. momentum: of each rank's own gradients; 0: plain error feedback."""

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
    """The elements that have grown largest, with their places: 8 k (R - 1) bytes from each rank.

    With momentum it is Deep Gradient Compression (Lin et al. 2018): each rank keeps the momentum of its own
    gradients, and forgets it where an element was sent. The optimizer should then be plain SGD.

    Raises:
        UsageError: nothing, or more than all, would be sent; or the momentum never fades.
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

    def setup(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """As in `Compressor`."""
        super().setup(shapes)
        self.velocity = np.zeros(self.residual.size if self.factor else 0, np.float32)

    def sum(self, gradient: np.ndarray, comm: Comm) -> np.ndarray:
        """As in `Compressor`."""
        if self.velocity.size:
            self.velocity *= self.factor
            self.velocity += gradient
            np.copyto(gradient, self.velocity)
        return super().sum(gradient, comm)

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

    def own_arrays(self) -> dict[str, np.ndarray]:
        """As in `Compressor`."""
        more = {"velocity": self.velocity} if self.velocity.size else {}
        return super().own_arrays() | more


def largest(array: np.ndarray, count: int) -> np.ndarray:
    """The places, ascending int32, of about ``count`` elements with the largest magnitude.

    The threshold comes from a sample (as in Lin et al. 2018), for to sort all would take longer than to send
    them; where too many pass it, these are sorted. All of them if ``count`` is their number.
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
    """The places and values of all ranks, in rank order; a collective."""
    counts = comm.allgather_obj(int(places.size))
    ends = np.cumsum(counts)
    parts = [slice(int(end) - count, int(end)) for end, count in zip(ends, counts, strict=True)]
    all_places, all_values = np.empty(ends[-1], np.int32), np.empty(ends[-1], np.float32)
    all_places[parts[comm.rank]], all_values[parts[comm.rank]] = places, values
    comm.allgather(all_places, parts)
    comm.allgather(all_values, parts)
    return [(all_places[part], all_values[part]) for part in parts]


class _Matrix(NamedTuple):
    """A weight as a matrix: where it lies in the flat array, and its shape."""

    part: slice
    rows: int
    columns: int


@dataclass(frozen=True)
class PowerSGDOptions:
    """How much smaller. rank: r. least_rate: how many times smaller a matrix must become."""

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

    One step of power iteration, begun with the right side that the last step found: P = sum_r M_r Q, made
    orthogonal; Q_r = M_r' P; everyone steps with P (sum_r Q_r)', and rank r has sent P Q_r'. A matrix of n x
    m travels as r (n + m) numbers. Vectors, and matrices that would not become ``least_rate`` times smaller,
    travel whole.

    Attributes:
        seed: of the first Q.
    """

    name, Options, by_horovod = "powersgd", PowerSGDOptions, True
    seed = 1

    def setup(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """As in `Compressor`."""
        super().setup(shapes)
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

    def check_worth(self) -> None:
        """As in `Compressor`."""
        if not self.right.size:
            raise UsageError(
                f"compression_rank {self.rank}: no weight would become {self.options.least_rate:g} times "
                f"smaller; no matrix has sides of more than {self._longest_side}. Use a lower "
                "--compression-rank, or --compression none"
            )

    @property
    def ratio(self) -> float:
        """How many times fewer numbers travel."""
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

    def common_arrays(self) -> dict[str, np.ndarray]:
        """As in `Compressor`."""
        return {"right": self.right}


# By name. Each is made of its options, and set up where the shapes of the weights are known.
COMPRESSORS: dict[str, type[Compressor]] = {one.name: one for one in (BFloat16, TopK, PowerSGD, OneBit)}
