"""The front door for users of Keras: `distribute` an optimizer, `shard` the data, call ``model.fit``."""

from __future__ import annotations

from functools import wraps
from typing import Any

import keras
import tensorflow as tf

from tf_dist.comm.communicators import as_comm
from tf_dist.comm.settings import same_environment
from tf_dist.errors import UsageError
from tf_dist.keras_fit import dataset, patches, self_test
from tf_dist.keras_fit.distributed_optimizer import made_distributed
from tf_dist.keras_fit.fit_session import independent as independent
from tf_dist.keras_fit.optimizers_of import reduction_of


def distribute(optimizer: keras.optimizers.Optimizer, comm: Any) -> keras.optimizers.Optimizer:
    """Make an optimizer work for all ranks; a collective: call it on every rank.

    Every step uses the mean of the ranks' gradients, taken before clipping, weight decay and EMA. With
    ``gradient_accumulation_steps`` the ranks talk once for each accumulated gradient. When the optimizer
    is built, rank 0's weights and optimizer state replace those of the others.

    In ``model.fit`` the step is that of one process with the global batch. In a loop of one's own the mean
    over ranks is that where all ranks have equally many rows, or rows with the sample weights of `shard`.

    Args:
        optimizer: any Keras optimizer; it is changed, not copied.
        comm: all ranks, from ``tf_dist.connect()``, or a communicator of mpi4py.

    Returns:
        The same optimizer, with an attribute ``comm``.

    Raises:
        UsageError: not a Keras optimizer, or one that is distributed already.
        LaunchError: this version of Keras does not call us, or the ranks do not agree on versions or model.
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
    self_test.run()
    return made_distributed(optimizer, comm)


@wraps(dataset.shard)
def shard(data: Any, comm: Any, **options: Any) -> tf.data.Dataset:
    """`dataset.shard`, whose datasets Keras's own methods know from then on."""
    patches.install()
    return dataset.shard(data, comm, **options)
