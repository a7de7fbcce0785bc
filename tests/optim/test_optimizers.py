import keras
import numpy as np
import pytest

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.optim import optimizers

# Muon and Adafactor treat matrices in their own way; all of them must at least take a step.
NAMES = (
    "adam",
    "adamw",
    "sgd",
    "rmsprop",
    "adagrad",
    "adadelta",
    "adamax",
    "nadam",
    "lion",
    "ftrl",
    "adafactor",
)


@pytest.fixture
def model():
    keras.utils.set_random_seed(0)
    made = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4), keras.layers.LayerNormalization()])
    for variable in made.trainable_variables:
        variable.assign(np.ones(variable.shape))
    return made


def step(optimizer, model, value):
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    optimizer.apply([np.full(v.shape, value, np.float32) for v in model.trainable_variables])
    return {variable.path: variable.numpy() for variable in model.trainable_variables}


def config(**values):
    return Config(**{"schedule": "constant", "warmup_steps": 0, "learning_rate": 0.1, **values})


@pytest.mark.parametrize("name", NAMES)
def test_each_by_name(model, name):
    optimizer = optimizers.build(config(optimizer=name), model, 10)
    assert not optimizer.built, "it would hold state of weights that this rank may not train"
    assert type(optimizer).__name__.lower() == name
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    assert all(
        np.isfinite(value).all() and (value != 1).any() for value in step(optimizer, model, 0.5).values()
    )


def test_names_as_keras_writes_them(model):
    assert isinstance(optimizers.build(config(optimizer="AdamW"), model, 10), keras.optimizers.AdamW)
    assert optimizers.build(config(optimizer="AdamW", weight_decay=0.0), model, 10).weight_decay in (0, None)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lion"])
def test_matrices_decay_and_vectors_do_not(model, name):
    optimizer = optimizers.build(config(optimizer=name, weight_decay=0.5), model, 10)
    for path, value in step(optimizer, model, 0.0).items():
        expected = 1 - 0.1 * 0.5 if value.ndim == 2 else 1.0
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_no_decay(model, name):
    optimizer = optimizers.build(config(optimizer=name, weight_decay=0.0), model, 10)
    assert all((value == 1).all() for value in step(optimizer, model, 0.0).values())


def test_the_learning_rate_follows_the_schedule(model):
    settings = config(schedule="linear", min_learning_rate=0.0, warmup_steps=2)
    optimizer = optimizers.build(settings, model, 6)
    seen = []
    for _ in range(6):
        seen.append(float(optimizer.learning_rate))
        step(optimizer, model, 0.1)
    np.testing.assert_allclose(seen, [0.05, 0.1, 0.1, 0.075, 0.05, 0.025], rtol=1e-5)


def test_more_arguments(model):
    optimizer = optimizers.build(config(optimizer="sgd", optimizer_args={"momentum": 0.75}), model, 10)
    assert optimizer.momentum == 0.75


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("argument", ["weight_decay", "learning_rate"])
def test_arguments_that_have_a_flag_are_never_silently_lost(model, name, argument):
    try:
        optimizer = optimizers.build(config(optimizer=name, optimizer_args={argument: 0.25}), model, 10)
    except UsageError as error:
        assert argument in str(error)
    else:
        assert float(getattr(optimizer, argument)) == 0.25


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"optimizer": "adan"}, "Keras has no optimizer 'adan'"),
        ({"optimizer": "adamv"}, "Did you mean 'adam"),
        ({"optimizer": "optimizer"}, "Keras has no optimizer"),
        ({"optimizer": "lossscaleoptimizer"}, "Keras has no optimizer"),
        ({"optimizer_args": {"beta_7": 0.9}}, "beta_7"),
        ({"optimizer": "sgd", "optimizer_args": {"momentum": 7}}, "momentum"),
        ({"optimizer": "sgd", "optimizer_args": {"momentum": "fast"}}, "momentum"),
    ],
    ids=str,
)
def test_refused(model, values, said):
    with pytest.raises(UsageError) as caught:
        optimizers.build(config(**values), model, 10)
    assert said in str(caught.value)
    assert caught.value.exit_code == 64
