"""Pseudo-perplexity: every token of a window is hidden once, and scored from the others."""

import math

import numpy as np

from tf_dist.comm.transport.base import SerialComm
from tf_dist.data.tokens import Sequences
from tf_dist.models.row_layout import RowLayout, Slots
from tf_dist.parallel.mesh import Mesh
from tf_dist.training.pseudo_perplexity import KEY, PseudoPerplexity

T, V = 5, 4
LAYOUT = RowLayout(Slots(T), Slots(0), V)


class Runner:
    """Gives the token 1 the probability 1/2 where it looks at a mask; notes what it has seen."""

    gathers_weights = False

    def __init__(self):
        self.hidden = []

    def outputs(self, x_BxT):
        self.hidden += [tuple(np.flatnonzero(row == LAYOUT.mask)) for row in x_BxT]
        probabilities = np.full((*x_BxT.shape, V), 1 / 6)
        probabilities[..., 1] = 1 / 2
        return np.log(probabilities).astype(np.float32)


def test_of_known_probabilities():
    tokens = np.array([1, 1, 2, 3, 1, 0, 1, 1, 1], np.uint16)  # two windows, the second of 3 tokens
    runner = Runner()
    metric = PseudoPerplexity(Sequences(tokens, T), LAYOUT, 10)
    found = metric(runner, Mesh(SerialComm()), 3, None)[KEY]
    ones, others = 3 + 2, 2 + 1
    wanted = math.exp((ones * math.log(2) + others * math.log(6)) / (ones + others))
    assert math.isclose(found, wanted, rel_tol=1e-6)
    assert set(runner.hidden) == {(place,) for place in range(T)}, "one token at a time"
