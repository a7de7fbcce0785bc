"""How a tensor is put together on one rank of the pieces that several have."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.thread_comm import on_ranks
from tf_dist.checkpoint.sharded_state import Entry, ShardedState
from tf_dist.parallel.sharding import ShardSpec
from tf_dist.parallel.tensor_shard import array_shard

SHAPE = (4, 3)
TABLE, NEXT = np.arange(12, dtype=np.float32), np.arange(100, 112, dtype=np.float32)
# What three ranks hold of a tied table's slot. It lies in two stages of a pipeline, each of which is divided
# between two replicas: in one stage before the cut, in the other one across it.
HELD = (slice(0, 12), slice(0, 5), slice(5, 12))


def piece(array, where):
    made = array_shard(array[where].copy(), ShardSpec(SHAPE))
    return made._replace(start=where.start, stop=where.stop)


def assembled(comm, held, to):
    """Two tensors of which ranks hold alike, one after another, as ``to`` has them."""
    whole = ShardedState.__new__(ShardedState)
    whole.mesh = SimpleNamespace(all=comm)
    whole.entries = [Entry(name, SHAPE, "float32", alike=True) for name in ("table", "next")]
    for entry, array in zip(whole.entries, (TABLE, NEXT), strict=True):
        entry.pieces = [piece(array, held[comm.rank])] if comm.rank in held else []
    whole._choose_senders()
    found = [np.array(tensor) for _, _, tensor in whole.shard([to, to])]
    comm.barrier()
    return found, [box.qsize() for box in comm._post.values()]


@pytest.mark.parametrize("to", range(4))
@pytest.mark.parametrize("order", [(0, 2, 3), (2, 3, 0)])
def test_a_tensor_that_one_rank_has_and_others_have_in_parts(order, to):
    """No part is sent that nobody waits for: a large one waits for ever, a small one is taken for another."""
    places = dict(zip(order, HELD, strict=True))
    for rank, (found, left) in enumerate(on_ranks(4, lambda comm: assembled(comm, places, to))):
        assert not any(left)
        if rank == to:
            for tensor, wanted in zip(found, (TABLE, NEXT), strict=True):
                np.testing.assert_array_equal(tensor, wanted.reshape(SHAPE))
        else:
            assert not found
