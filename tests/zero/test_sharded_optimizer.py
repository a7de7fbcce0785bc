"""A shard's step against that of whole variables: the same bits. Legend: P parameters."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.errors import UsageError
from tf_dist.models.meta_init import is_deferred, outline
from tf_dist.optim.elementwise import slots_of
from tf_dist.optim.fused_optimizer import BlockStep
from tf_dist.zero.sharded_optimizer import ShardedOptimizer, values_of

K = keras.optimizers
SHAPES = [(7, 5), (5,), (5, 40), (), (2, 3, 4), (16, 8)]
P = sum(int(np.prod(shape)) for shape in SHAPES)
# Cuts inside variables, between them, and shards of nothing.
CUTS = [[0, P], [0, 35, 100, P], [0, 0, 230, 230, P]]
MAKE = {
    "adamw": lambda: K.AdamW(0.01, weight_decay=0.1),
    "nadam": lambda: K.Nadam(keras.optimizers.schedules.CosineDecay(0.02, 4)),
    "amsgrad": lambda: K.Adam(0.01, amsgrad=True),
    "nesterov": lambda: K.SGD(0.1, momentum=0.9, nesterov=True),
    "lion": lambda: K.Lion(0.01, weight_decay=0.1),
}
if hasattr(K, "ScheduleFreeAdamW"):
    MAKE["schedule-free"] = lambda: K.ScheduleFreeAdamW(0.01)


def variables_of():
    random = np.random.default_rng(0)
    values = [random.normal(size=shape).astype(np.float32) for shape in SHAPES]
    return [keras.Variable(value, name=f"v{i}") for i, value in enumerate(values)]


def made(kind):
    variables, optimizer = variables_of(), MAKE[kind]()
    if optimizer.weight_decay is not None:
        optimizer.exclude_from_weight_decay(var_list=[v for v in variables if len(v.shape) < 2])
    return variables, optimizer


GRADIENTS = [np.random.default_rng(i).normal(size=P).astype(np.float32) for i in range(3)]


def flat(arrays):
    return np.concatenate([np.asarray(array).ravel() for array in arrays])


@pytest.mark.parametrize("kind", MAKE)
def test_shards_have_the_bits_of_whole_variables(kind):
    variables, optimizer = made(kind)
    optimizer.build(variables)
    whole = BlockStep(optimizer, variables)
    for gradient in GRADIENTS:
        whole.apply(tf.constant(gradient), np.float32(0.5))
    weights = flat(v.value for v in variables)
    state = {name: flat(np.asarray(v.value) for v in slot) for name, slot in slots_of(optimizer).items()}
    for cuts in CUTS:
        for start, stop in itertools.pairwise(cuts):
            own, sharded = made(kind)
            step = ShardedOptimizer(sharded, own, slice(start, stop))
            for gradient in GRADIENTS:
                step.apply(gradient[start:stop].copy(), 0.5)
                for one in step.stretches:  # as the others' weights come back, with what was stepped here
                    if not one.whole and one.inner:
                        full = np.array(values_of(own[one.number]))
                        full[one.inner.start : one.inner.stop] = values_of(one.variable)
                        own[one.number].assign(full.reshape(own[one.number].shape))
            found = np.empty(stop - start, np.float32)
            step.read(found)
            np.testing.assert_array_equal(found, weights[start:stop])
            for name, slot in slots_of(sharded).items():
                np.testing.assert_array_equal(
                    flat(np.asarray(v.value) for v in slot), state[name][start:stop]
                )


def test_state_is_no_longer_than_the_shard():
    variables, optimizer = made("adamw")
    ShardedOptimizer(optimizer, variables, slice(40, 100))
    sizes = [sum(int(np.prod(v.shape)) for v in slot) for slot in slots_of(optimizer).values()]
    assert sizes == [60, 60]


def test_pieces_are_what_a_checkpoint_takes_and_gives():
    variables, optimizer = made("adamw")
    step = ShardedOptimizer(optimizer, variables, slice(30, 100))
    (first,) = step.weight_shards(0)
    assert (first.part.whole, first.start, first.stop) == ((7, 5), 30, 35)
    first.write(np.arange(5, dtype=np.float32))
    np.testing.assert_array_equal(first.read(), np.arange(5))
    (second,) = step.slot_shards(1, "_momentums")
    assert (second.part.whole, second.start, second.stop) == ((5,), 0, 5)
    assert step.slot_shards(5, "_momentums") == []


def test_of_an_outline_only_the_shard_gets_memory():
    keras.utils.set_random_seed(1)
    with outline():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8), keras.layers.Dense(8)])
    ShardedOptimizer(K.Adam(0.1), model.trainable_variables, slice(0, 40))
    assert [is_deferred(variable) for variable in model.trainable_variables] == [False, False, True, True]


@pytest.mark.parametrize("make", [lambda: K.Adafactor(0.1), lambda: K.Adam(0.1, clipnorm=1.0)])
def test_optimizers_that_need_more_than_a_shard_are_refused(make):
    with pytest.raises(UsageError, match=r"AdamW.*--strategy allreduce"):
        ShardedOptimizer(make(), variables_of(), slice(0, 40))


def test_a_built_optimizer_is_refused():
    variables, optimizer = made("adamw")
    optimizer.build(variables)
    with pytest.raises(UsageError, match="has been built"):
        ShardedOptimizer(optimizer, variables, slice(0, 40))
