"""What a script's ``tf_dist`` calls mean in one process of plain Keras: nothing.

The oracle puts this module in tf_dist's place, so that one script text is both, and nothing of tf_dist is
even imported there.
"""

from types import SimpleNamespace

__version__ = "plain"


def connect(*_, **__):
    """One rank, with the two attributes that scripts read."""
    return SimpleNamespace(rank=0, size=1)


def distribute(optimizer, comm):
    return optimizer


def shard(data, comm, *, batch_size=None, shuffle=True, training=True, **_):
    """The global batches, made by the adapter that ``fit(x, y, batch_size=..., shuffle=False)`` uses."""
    import tensorflow as tf
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    if isinstance(data, tf.data.Dataset):
        return data if batch_size is None else data.batch(batch_size)
    if not isinstance(data, tuple):
        return data  # a PyDataset or a generator has batches of its own
    if shuffle and training:
        raise ValueError("an oracle needs shuffle=False: the order of a shuffle is not plain Keras's")
    adapter = ArrayDataAdapter(*data, batch_size=batch_size or 32, shuffle=False)
    # As fit knows it: where the length is unknown, Keras counts the call that finds the end as a batch, too.
    return adapter.get_tf_dataset().apply(tf.data.experimental.assert_cardinality(adapter.num_batches))
