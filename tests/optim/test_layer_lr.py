"""Learning rates by layer: which factor each weight has, and that its update has it."""

import keras
import numpy as np
import pytest

from tf_dist.config.fine_tuning import FineTuningOptions
from tf_dist.errors import UsageError
from tf_dist.optim.fused_optimizer import BlockStep, optimizer_step
from tf_dist.optim.layer_lr import layer_depths, lr_scale_of, scale_learning_rates, set_lr_scale

K = keras.optimizers


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        ("embed/e positions/p layer_0_norm/g layer_0_in/k layer_1_norm/g final_norm/g", [0, 0, 1, 1, 2, 3]),
        ("embedding/embeddings layer_0/lstm_cell/kernel layer_1/lstm_cell/kernel", [0, 1, 2]),
        ("embedding/embeddings embedding/reverse_embeddings layer_0/k final_norm/g", [0, 2, 1, 2]),
        ("layer_9/k layer_10/k layer_10/b head/k head/b", [1, 2, 2, 3, 3]),
        ("embedding/e encoder_layer_0_in/k encoder_norm/g decoder_layer_0_in/k head/k", [0, 1, 1, 2, 3]),
        ("dense/k dense/b dense_1/k player_1/k", [0, 0, 1, 2]),
        ("embedding/embeddings embedding/reverse_embeddings dense/k", [0, 2, 1]),
    ],
)  # fmt: skip
def test_depths(paths, wanted):
    assert layer_depths(paths.split()) == wanted


def variables():
    shapes = {"embedding": (5, 3), "layer_0": (3, 4), "layer_1": (4,), "head": (7, 40)}
    rng = np.random.default_rng(1)
    return [keras.Variable(rng.normal(size=shape), dtype="float32", name=n) for n, shape in shapes.items()]


def test_factors():
    weights = variables()
    weights[1].trainable = False
    scale_learning_rates(
        weights, FineTuningOptions(layer_lr_decay=0.5, lr_scale="layer_*=3, layer_1=10 ,head=2")
    )
    assert [lr_scale_of(one) for one in weights] == [0.125, 1, 5, 2]
    with pytest.raises(UsageError, match="--lr-scale 'layer_0' matches no weight"):  # it is frozen
        scale_learning_rates(weights, FineTuningOptions(lr_scale="layer_0=3"))


MAKE = {
    "sgd": lambda rate: K.SGD(rate, momentum=0.9),
    "adam": lambda rate: K.Adam(rate),
    "adamw": lambda rate: K.AdamW(rate, weight_decay=0.1),
    "lion": lambda rate: K.Lion(rate),
    "nadam": lambda rate: K.Nadam(rate),
}


@pytest.mark.parametrize("alone_from", [1, 30, 1 << 30])
@pytest.mark.parametrize("kind", MAKE)
def test_a_factor_is_one_of_the_learning_rate(kind, alone_from):
    """Each weight ends as with an optimizer of its own with that rate, whatever the blocks are."""
    factors, found, wanted = [0.5, 1.0, 0.5, 4.0], variables(), variables()
    for variable, factor in zip(found, factors, strict=True):
        set_lr_scale(variable, factor)
    optimizer = MAKE[kind](0.01)
    optimizer.build(found)
    step = BlockStep(optimizer, found, alone_from=alone_from)
    apart = [MAKE[kind](0.01 * factor) for factor in factors]
    for one, variable in zip(apart, wanted, strict=True):
        one.build([variable])
    steps = [BlockStep(one, [variable]) for one, variable in zip(apart, wanted, strict=True)]
    rng = np.random.default_rng(2)
    for _ in range(4):
        gradients = [rng.normal(size=variable.shape).astype(np.float32).reshape(-1) for variable in found]
        step.apply(np.concatenate(gradients), np.float32(0.5))
        for one, gradient in zip(steps, gradients, strict=True):
            one.apply(gradient, np.float32(0.5))
    for mine, theirs, before in zip(found, wanted, variables(), strict=True):
        np.testing.assert_array_equal(np.asarray(mine.value), np.asarray(theirs.value))
        # Not all: steps of Lion, which all have one size, may come back to where they began.
        assert (np.asarray(mine.value) != np.asarray(before.value)).mean() > 0.5


def test_blocks_without_factors_are_as_before():
    weights = variables()
    optimizer = K.Adam(0.01)
    optimizer.build(weights)
    step = BlockStep(optimizer, weights)
    assert step._alone == [] and step._groups == [[0, 1, 2, 3]]


def test_an_optimizer_of_whole_variables_cannot():
    weights = variables()
    set_lr_scale(weights[0], 0.5)
    optimizer = K.Adafactor(0.01)
    optimizer.build(weights)
    with pytest.raises(UsageError, match="learning rates by layer need an elementwise optimizer"):
        optimizer_step(optimizer, weights)
