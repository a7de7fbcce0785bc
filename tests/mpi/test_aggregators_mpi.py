"""`distribute(optimizer, comm, aggregator=...)`: what sums gradients of `model.fit` over real ranks."""

import numpy as np
import pytest
from test_fit_mpi import EPOCHS, MODELS, G, X, Y, adam, functional, parallel, scheduled, serial, weights

from tf_dist.errors import LaunchError, NumericError, UsageError

pytestmark = pytest.mark.ranks(2)

COMPRESSED = {
    "bf16": lambda kinds: kinds.BFloat16(),
    "topk": lambda kinds: kinds.TopK(density=0.3),
    "powersgd": lambda kinds: kinds.PowerSGD(rank=1, least_rate=1.0),
    "onebit": lambda kinds: kinds.OneBit(),
}


def trained(optimizer, comm, aggregator, build=functional, epochs=EPOCHS, **more):
    import tf_dist

    model = build(1 + comm.rank)
    model.compile(tf_dist.distribute(optimizer, comm, aggregator), loss="mse", **more)
    data = tf_dist.shard((X, Y), comm, batch_size=G)
    return model, model.fit(data, epochs=epochs, verbose=0, shuffle=False).history["loss"]


def refused(everyone, kind, function):
    """The message of an error that all ranks raise alike."""
    with pytest.raises(kind) as caught:
        function()
    said = everyone(str(caught.value))
    assert said == [said[0]] * len(said)
    return said[0]


# The default of one node with every model; how else sums travel does not depend on the model.
WHOLE = [
    *(
        pytest.param("window", name, marks=[pytest.mark.extended] * (name not in ("embedding", "train_step")))
        for name in MODELS
    ),
    *(("fixed-order", "embedding"), ("allreduce", "functional")),
]


@pytest.mark.parametrize(("kind", "name"), WHOLE)
def test_whole_sums_are_those_of_one_process_and_the_same_bits_twice(connected, everyone, kind, name):
    if kind == "window" and connected.size == 1:
        pytest.skip("one rank has none")
    found = [weights(trained(scheduled(), connected, kind, MODELS[name])[0]) for _ in range(2)]
    assert np.abs(found[0] - serial(MODELS[name], scheduled())).max() < 1e-5
    assert len(set(everyone(found[0].tobytes()))) == 1
    if kind != "allreduce":
        assert np.array_equal(*found)


def test_window_and_messages_have_the_same_bits(connected):
    import tf_dist

    order = [tf_dist.aggregators.FixedOrder(carrier=carrier) for carrier in ("auto", "messages")]
    by_window, by_messages = (weights(trained(adam(), connected, one)[0]) for one in order)
    assert np.array_equal(by_window, by_messages)


def test_the_default_is_a_window_where_all_ranks_share_one(connected):
    model, _ = trained(adam(), connected, "auto")
    assert np.array_equal(weights(model), weights(parallel(functional, adam(), connected)))
    if connected.size > 1:
        assert np.array_equal(weights(model), weights(trained(adam(), connected, "window")[0]))
    aggregator = model.optimizer.reduction.aggregator
    assert list(aggregator._in_window.values()) == [connected.size > 1]


def twelve_epochs(comm, aggregator):
    import keras

    return trained(keras.optimizers.SGD(0.05), comm, aggregator, epochs=12)


@pytest.fixture(scope="module")
def last_of_whole_sums(connected):
    """The last loss where gradients are not compressed."""
    return twelve_epochs(connected, "allreduce")[1][-1]


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_sums_learn_and_replicas_stay_equal(connected, everyone, last_of_whole_sums, kind):
    import tf_dist

    model, losses = twelve_epochs(connected, COMPRESSED[kind](tf_dist.aggregators))
    assert len(set(everyone(weights(model).tobytes()))) == 1
    assert losses[-1] < 0.7 * losses[0]
    assert losses[-1] == pytest.approx(last_of_whole_sums, abs=0.1)
    aggregator = model.optimizer.reduction.aggregator
    assert aggregator.residual.any()  # something was compressed, and its rest kept


def test_sparse_gradients_are_never_compressed(connected, everyone):
    """The embedding steps as with whole sums, while one element is sent of all that is dense."""
    import keras

    import tf_dist

    def model_of(seed):
        keras.utils.set_random_seed(seed)
        x = keras.Input((4,), dtype="int32")
        return keras.Model(x, keras.layers.Dense(1)(keras.layers.Flatten()(keras.layers.Embedding(9, 3)(x))))

    def first_step(aggregator):
        model = model_of(1 + connected.rank)
        model.compile(tf_dist.distribute(adam(), connected, aggregator), loss="mse")
        ids = np.random.default_rng(1).integers(0, 9, (8, 4))
        data = tf_dist.shard((ids, ids[:, :1].astype(np.float32)), connected, batch_size=8)
        model.fit(data, verbose=0, shuffle=False)
        return [np.asarray(one.value) for one in model.weights]

    whole, cut = first_step("allreduce"), first_step(tf_dist.aggregators.TopK(density=0.01))
    np.testing.assert_allclose(whole[0], cut[0], atol=1e-6)
    assert not np.allclose(whole[1], cut[1], atol=1e-6)


def test_accumulated_gradients_are_compressed_once(connected, everyone):
    import keras

    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=2)
    model, losses = trained(optimizer, connected, "bf16", epochs=8)
    assert losses[-1] < losses[0]
    assert len(set(everyone(weights(model).tobytes()))) == 1


def test_mixed_precision_scales_around_an_aggregator(connected, everyone):
    import keras

    import tf_dist

    def distributed(optimizer):
        return tf_dist.distribute(optimizer, connected, "bf16")

    said = refused(everyone, UsageError, lambda: distributed(keras.optimizers.LossScaleOptimizer(adam())))
    assert "Distribute the inner optimizer" in said
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = functional(1 + connected.rank)
    finally:
        keras.config.set_dtype_policy("float32")
    model.compile(distributed(keras.optimizers.SGD(0.05)), loss="mse")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    model.fit(tf_dist.shard((X, Y), connected, batch_size=G), epochs=2, verbose=0, shuffle=False)
    assert len(set(everyone(weights(model).tobytes()))) == 1
    assert np.isfinite(weights(model)).all()


def test_a_gradient_that_is_not_finite_stops_all_ranks(connected, everyone):
    import tensorflow as tf

    import tf_dist

    model = functional()
    optimizer = tf_dist.distribute(scheduled(), connected, "bf16")
    optimizer.build(model.trainable_variables)
    before = weights(model)
    bad = [tf.fill(v.shape, float("nan") if connected.rank == 0 else 1.0) for v in model.trainable_variables]
    said = refused(everyone, NumericError, lambda: optimizer.apply(bad, model.trainable_variables))
    assert f"not finite on 1 of {connected.size} ranks" in said
    assert np.array_equal(before, weights(model))


def test_another_list_of_variables_has_no_error_feedback(connected, everyone):
    import tensorflow as tf

    import tf_dist

    model = functional()
    optimizer = tf_dist.distribute(scheduled(), connected, "bf16")
    variables = model.trainable_variables
    optimizer.build(variables)
    ones = [tf.ones(variable.shape) for variable in variables]
    optimizer.apply(ones, variables)
    said = refused(everyone, UsageError, lambda: optimizer.apply([None, *ones[1:]], variables))
    assert "keeps what it has not sent" in said


def test_what_cannot_be_is_refused_before_the_first_step(connected, everyone):
    import tf_dist

    def refuse(kind, aggregator, optimizer=None):
        return refused(everyone, kind, lambda: tf_dist.distribute(optimizer or adam(), connected, aggregator))

    assert "choose one of auto, allreduce" in refuse(UsageError, "ring")
    assert "Use keras.optimizers.SGD" in refuse(UsageError, "onebit")
    mine = tf_dist.aggregators.TopK()
    tf_dist.distribute(scheduled(), connected, mine)
    assert "make a new one for each" in refuse(UsageError, mine)
    if connected.size > 1:
        own = "bf16" if connected.rank else "auto"
        assert "do not agree on distribute()" in refuse(LaunchError, own)
        own = tf_dist.aggregators.TopK(density=0.1 * (1 + connected.rank))
        assert "aggregator options" in refuse(LaunchError, own)
        assert "rank 1" in refuse(UsageError, "ring" if connected.rank == 1 else "auto")
    model = functional()
    model.compile(tf_dist.distribute(adam(), connected, "powersgd"), loss="mse")
    before = weights(model)
    data = tf_dist.shard((X, Y), connected, batch_size=G)
    assert "no weight would become" in refused(everyone, UsageError, lambda: model.fit(data, verbose=0))
    assert np.array_equal(before, weights(model))


def test_horovod_carries_some(connected, carried):
    import tf_dist

    if carried.keeps_order:
        return
    with pytest.raises(UsageError, match="backend horovod cannot carry"):
        tf_dist.distribute(adam(), carried, "fixed-order")
