"""Ranks that share layers must talk in one order, or they wait for each other for ever."""

import random
import time

import keras
import numpy as np
import pytest

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import LaunchError, behind
from tf_dist.layers import tensor_parallel
from tf_dist.models.build import build
from tf_dist.runners import loss
from tf_dist.runners.replica import Replica

B, T, V = 2, 12, 13


class Dawdling(SerialComm):
    """The first of two ranks, the other one being silent; it notes what it says, and takes its time.

    Whatever TensorFlow might do in another order, it does, while a call takes a moment.
    """

    size = 2

    def __init__(self):
        super().__init__()
        self.said = []
        self.before = lambda verb, array, root: self.said.append((verb, array.size))

    def _allreduce(self, array):
        time.sleep(0.0004 * random.random())

    def _allgather(self, array, parts):
        time.sleep(0.0004 * random.random())


def replica_of(comm, name):
    config = Config(model=name, vocab_size=V, seq_len=T, layers=2, width=16, heads=2, dropout=0.1)
    return Replica(build(config, tensor_parallel(comm)), keras.optimizers.SGD(0.1), B, T, 1)


@pytest.mark.parametrize("chunks", [pytest.param(1, marks=pytest.mark.extended), 5])
@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_one_order(name, chunks, monkeypatch):
    """With Grappler's dependency optimizer every few runs of the LSTM differ: see `keep_order`."""
    monkeypatch.setattr(loss, "CHUNK", -(-B * T // chunks) * -(-V // 2))
    comm = Dawdling()
    replica = replica_of(comm, name)
    x = np.zeros((B, T), np.int32)
    orders = set()
    for step in range(20):
        comm.said.clear()
        replica.gradients(x, x, (step, 0))
        replica.evaluate(x, x)
        orders.add(tuple(comm.said))
    (order,) = orders
    assert order.count(("allgather", 2 * 4 * -(-B * T // chunks) * 4)) == 2 * chunks  # four facts of a token


def test_what_goes_wrong_inside_is_said():
    comm = Dawdling()
    replica = replica_of(comm, "transformer")

    def refuse(array):
        raise LaunchError("the other rank is on the moon. Bring it back")

    comm._allreduce = refuse
    with pytest.raises(Exception, match="on the moon") as caught:
        replica.evaluate(*np.zeros((2, B, T), np.int32))
    assert isinstance(behind(caught.value), LaunchError)
