"""What an aggregator is: the one object between a rank's flat gradient and the `Comm`.

``Trainer`` and ``model.fit`` sum gradients through the same ones: `tf_dist.parallel.aggregators` has those
that sum them whole, `tf_dist.parallel.compress` those that send less.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import numpy as np

from tf_dist.comm.transport.base import Comm
from tf_dist.options import Configured


class Aggregator(Configured, ABC):
    """Sums the flat gradients of all ranks.

    Attributes:
        exact: the result is the sum of what all ranks gave, but for the rounding of float additions. False:
            ranks send less, and keep the rest for their next gradient (error feedback): it belongs to one
            list of variables, and must never see a number that is not finite.
        by_horovod: whether Horovod can carry it.
        of_momentum: made for the momentum of Adam, which the ranks make together, or for plain SGD.
        taken: an optimizer sums by this object.
    """

    exact = True
    by_horovod = True
    of_momentum = False
    taken = False

    def setup(self, shapes: Sequence[tuple[int, ...]], comm: Comm) -> None:
        """Get ready for gradients of weights of such shapes; a collective.

        One that is ``exact`` may be set up for several lists of shapes.

        Raises:
            UsageError: on all ranks: this cannot sum such gradients.
            LaunchError: on all ranks: these ranks cannot sum so.
        """

    def check_smaller(self) -> None:
        """Refuse, after `setup`, where nothing would become smaller.

        Raises:
            UsageError: on all ranks, with what would do.
        """

    @abstractmethod
    def aggregate(self, gradient: np.ndarray, comm: Comm, out: np.ndarray) -> np.ndarray:
        """Sum over the ranks; a collective.

        Args:
            gradient: this rank's, (P,): only read, unless it is ``out``.
            comm: the ranks.
            out: (P,) of the same dtype, whose content is lost; may be ``gradient`` itself.

        Returns:
            The sum, (P,), of the same bits on every rank: in ``out``; or in memory of the Comm's own, to be
            read before the next sum and not written to.
        """


def elements_of(shapes: Sequence[tuple[int, ...]]) -> int:
    """P, the elements of arrays of such shapes together."""
    return sum(prod(shape) for shape in shapes)
