"""Digests of global batches, compared between ranks during training: all ranks must read the same data.

Each rank takes its rows of the same global batches, so every example is seen once only if all ranks read
the same: a shuffle without a seed, another file, or a random augmentation on each rank are found here.
Nothing is read for the comparison: digests are noted when a batch is made for training.
"""

from __future__ import annotations

import zlib
from array import array
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import numpy as np
import tensorflow as tf

from tf_dist.comm.formatting import named
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import LaunchError

# Of a larger tensor only rows spread over it are read: a digest must not cost as much as a step.
MOST_BYTES = 1 << 20
# Iterations whose batches are compared still.
LATEST = 2

_of_comm: WeakKeyDictionary[Comm, WeakValueDictionary[int, Fingerprints]] = WeakKeyDictionary()
_made: WeakKeyDictionary[Comm, int] = WeakKeyDictionary()


class Fingerprints:
    """Digests of the global batches of one dataset, by iteration; made on all ranks in one order."""

    def __init__(self, comm: Comm) -> None:
        # By their number since the beginning: one rank may have begun an epoch that another has not.
        self.iterations: dict[int, array[int]] = {}
        self._begun = 0
        number = _made[comm] = _made.get(comm, 0) + 1
        _of_comm.setdefault(comm, WeakValueDictionary())[number] = self

    def noted(self, index: Any, batch: Any) -> Any:
        """An operation that notes the digest of a batch (nest of tensors) of a place in its iteration."""
        leaves = [part for leaf in tf.nest.flatten(batch) for part in _parts(leaf)]
        return tf.numpy_function(self._note, [index, *leaves], tf.int64, stateful=True)

    def _note(self, index: np.ndarray, *leaves: np.ndarray) -> np.ndarray:
        if index == 0:
            self._begun += 1
            self.iterations[self._begun] = array("I")
            self.iterations.pop(self._begun - LATEST, None)
        self.iterations[self._begun].append(digest(leaves))
        return np.asarray(index)


def compare_all(comm: Comm) -> None:
    """Compare what was noted on all ranks; a collective.

    Raises:
        LaunchError: on all ranks, if a batch differs.
    """
    mine = {
        f"{number} {begun}": list(digests)
        for number, prints in list(_of_comm.get(comm, {}).items())
        for begun, digests in list(prints.iterations.items())
    }
    lengths = comm.allgather_obj({name: len(digests) for name, digests in mine.items()})
    shared = [name for name in lengths[0] if all(name in theirs for theirs in lengths)]
    common = {name: min(theirs[name] for theirs in lengths) for name in shared}
    crcs = {name: zlib.crc32(np.array(mine[name][: common[name]], "<u4").data) for name in shared}
    everyone = comm.allgather_obj(crcs)
    for name in shared:
        if len({theirs[name] for theirs in everyone}) > 1:
            _of_comm[comm].pop(int(name.split()[0]), None)  # said once: what is read later is another matter
            _differ(comm.allgather_obj(mine[name][: common[name]]))


def digest(leaves: Any) -> int:
    """CRC-32 of arrays: of all bytes up to a size, of rows spread over larger ones."""
    crc = 0
    for leaf in leaves:
        values = np.asarray(leaf)
        crc = zlib.crc32(f"{values.dtype}{values.shape}".encode(), crc)
        if values.nbytes > MOST_BYTES and values.ndim:
            values = values[:: -(-values.nbytes // MOST_BYTES)]
        if values.dtype.kind in "OUS":
            crc = zlib.crc32(repr(values.tolist()).encode(), crc)
        else:
            crc = zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, crc)
    return crc


def _parts(leaf: Any) -> list[Any]:
    if isinstance(leaf, tf.RaggedTensor):
        return [leaf.flat_values, *leaf.nested_row_splits]
    if isinstance(leaf, tf.SparseTensor):
        return [leaf.indices, leaf.values]
    return [leaf] if tf.is_tensor(leaf) else []


def _differ(everyone: list[list[int]]) -> None:
    place = next(i for i, digests in enumerate(zip(*everyone, strict=True)) if len(set(digests)) > 1)
    ranks: dict[int, list[int]] = {}
    for rank, digests in enumerate(everyone):
        ranks.setdefault(digests[place], []).append(rank)
    who = " and ".join(named(group) for group in ranks.values())
    raise LaunchError(
        f"the ranks do not read the same data: global batch {place} of an epoch is another one on {who}, so "
        "some examples would be used twice and others never. All ranks must read the same batches in the "
        "same order: give shuffle() a seed (or call keras.utils.set_random_seed on all ranks), draw random "
        "augmentation from a seed, and read the same files. If each rank reads a part of its own, say so: "
        "tf_dist.shard(dataset, comm, sharded=True)"
    )
