"""Public API for Keras users: `distribute` an optimizer, `shard` a dataset, call ``model.fit``."""

from __future__ import annotations

from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.runtime.communicators import as_comm
from tf_dist.comm.runtime.consensus import agree, everywhere
from tf_dist.comm.runtime.kernel_settings import same_environment
from tf_dist.comm.transport.base import Comm
from tf_dist.errors import UsageError
from tf_dist.keras_fit import dataset, patches, self_test
from tf_dist.keras_fit.distributed_optimizer import check_aggregator, made_distributed
from tf_dist.keras_fit.fit_session import independent as independent
from tf_dist.keras_fit.optimizers_of import reduction_of
from tf_dist.parallel.aggregators import Aggregator, aggregator_of


def distribute(
    optimizer: keras.optimizers.Optimizer, comm: Any, aggregator: Aggregator | str = "auto"
) -> keras.optimizers.Optimizer:
    """Make an optimizer work for all ranks; a collective: call it on every rank.

    Every step uses the mean of the ranks' gradients, taken before clipping, weight decay and EMA. With
    ``gradient_accumulation_steps`` the ranks talk once for each accumulated gradient. When the optimizer
    is built, rank 0's weights and optimizer state replace those of the others.

    In ``model.fit`` the step is that of one process with the global batch. In a loop of one's own the mean
    over ranks is that where all ranks have equally many rows, or rows with the sample weights of `shard`.

    Args:
        optimizer: any Keras optimizer; it is changed, not copied.
        comm: all ranks, from ``tf_dist.connect()``, or a communicator of mpi4py.
        aggregator: sums the dense gradients of all ranks: a name, or an object of `tf_dist.aggregators`.

            - ``"auto"``: in a shared window and in a fixed order where all ranks share memory, else
              ``"allreduce"``.
            - ``"allreduce"``: the transport's own sum.
            - ``"fixed-order"``: the same bits in each run with so many ranks, also between nodes;
              ``"window"``: the same, and refuse to train without a shared window.
            - ``"bf16"``, ``"topk"``, ``"powersgd"``, ``"onebit"``, or an object with options such as
              ``PowerSGD(rank=4)``: compressed, with error feedback (Karimireddy et al. 2019). What was not
              sent yet stays with each rank, and is not saved with the optimizer. Sparse gradients, losses,
              counts and metrics are never compressed. Training is no longer that of one process.

    Returns:
        The same optimizer, with an attribute ``comm``.

    Raises:
        UsageError: not a Keras optimizer, or one that is distributed already; on all ranks: an aggregator
            that does not exist, or does not fit the optimizer.
        LaunchError: on all ranks: this version of Keras does not call us, or the ranks do not agree on
            versions, aggregator or model.
        NumericError: on all ranks, in a step: a gradient that is to be compressed is not finite.
    """
    comm = as_comm(comm)
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise UsageError(
            f"distribute() takes a Keras optimizer, such as keras.optimizers.Adam(), not {optimizer!r}"
        )
    if reduction_of(optimizer) is not None:
        raise UsageError(
            "this optimizer is distributed already: call distribute() once, on the outermost one"
        )
    patches.install()
    same_environment(comm)
    sums = everywhere(comm, lambda: _fitting(aggregator, optimizer, comm))
    agree(comm, {"aggregator": str(sums), "aggregator options": sums.facts()}, "distribute()")
    self_test.run()
    return made_distributed(optimizer, comm, sums)


def _fitting(wanted: Aggregator | str, optimizer: keras.optimizers.Optimizer, comm: Comm) -> Aggregator:
    found = aggregator_of(wanted)
    check_aggregator(found, optimizer)
    if not (found.by_horovod or comm.keeps_order):
        raise UsageError(
            f"backend horovod cannot carry aggregator {found}: use backend mpi, or aggregator 'allreduce'"
        )
    return found


@wraps(dataset.shard)
def shard(data: Any, comm: Any, **options: Any) -> tf.data.Dataset:
    """`dataset.shard`, whose datasets Keras's own methods know from then on."""
    patches.install()
    return dataset.shard(data, comm, **options)
