"""Models of which each rank has its parts: they begin as the whole model does."""

import math
import re
import threading

import keras
import numpy as np
import pytest

from tests.thread_comm import ThreadComm
from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.layers import tensor_parallel
from tf_dist.models.build import build
from tf_dist.models.meta_init import initial_value, is_deferred, outline
from tf_dist.parallel.sharding import part_of
from tf_dist.runners.rng import generator_states
from tf_dist.training.xla_autotune import talks_inside

SIZES = {"vocab_size": 13, "seq_len": 8, "width": 12, "heads": 6, "layers": 2, "dropout": 0.1}
MODELS = [("transformer", True), ("transformer", False), ("lstm", True), ("lstm", False)]


def rank_of(rank, size):
    """A rank that nobody talks to: models are made without a word."""
    return ThreadComm(rank, size, None, threading.Barrier(size))


def made(config, size):
    """The whole model, and that of each rank."""
    return build(config), [build(config, tensor_parallel(rank_of(rank, size))) for rank in range(size)]


def names(model):
    # Keras numbers the seed generators, and cells, of a process.
    return [re.sub(r"_\d+(?=/)", "", variable.path) for variable in model.variables]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_the_parts_make_up_the_whole_model(name, tied, size):
    whole, parts = made(Config(model=name, tie_embeddings=tied, **SIZES), size)
    for own in parts:
        assert names(own) == names(whole)
        assert len(generator_states(own)) == len(generator_states(whole))
        assert [part_of(v).whole for v in own.weights] == [tuple(v.shape) for v in whole.weights]
        assert all(part_of(v).shape == tuple(v.shape) for v in own.weights)
    for variable, *owns in zip(whole.variables, *(own.variables for own in parts), strict=True):
        if variable.path.endswith("seed_generator_state"):
            continue
        put = np.full(variable.shape, np.nan, np.float32)
        for own in owns:
            part_of(own).put(put, own.numpy())
        np.testing.assert_array_equal(put, variable.numpy())
    held, all_of_it = (sum(math.prod(v.shape) for v in model.weights) for model in (parts[0], whole))
    assert held < 0.7 * all_of_it


@pytest.mark.parametrize(("name", "tied"), MODELS)
def test_an_outline_of_them(name, tied):
    """Made without weights, each begins with the same value."""
    config = Config(model=name, tie_embeddings=tied, **SIZES)
    whole = build(config)
    with outline():
        own = build(config, tensor_parallel(rank_of(1, 3)))
    for mine, theirs in zip(own.trainable_variables, whole.trainable_variables, strict=True):
        assert is_deferred(mine)
        np.testing.assert_array_equal(initial_value(mine), part_of(mine).take(theirs.numpy()))


def test_xla_is_told():
    config = Config(**SIZES)
    assert talks_inside(build(config)) == ""
    own = build(config, tensor_parallel(rank_of(0, 2)))
    assert "layer 'embedding' talks to other ranks inside a step" in talks_inside(own)
    # Keras's own `compile` does not try either.
    own.compile(loss="mse")
    assert not own.jit_compile


def test_one_rank_has_the_plain_layers():
    model = build(Config(**SIZES), tensor_parallel(rank_of(0, 1)))
    assert talks_inside(model) == ""


def mixed(config, layers):
    """A user's model, of layers that are divided and of others."""
    tokens = keras.Input((config.seq_len,), dtype="int32")
    x = keras.layers.Embedding(config.vocab_size, config.width)(tokens)
    x = layers.row_dense(config.width)(layers.column_dense(4 * config.width, activation="relu")(x))
    return keras.Model(tokens, keras.layers.Dense(config.vocab_size)(x))


def undivided(config):
    tokens = keras.Input((config.seq_len,), dtype="int32")
    return keras.Model(tokens, keras.layers.Embedding(config.vocab_size, config.vocab_size)(tokens))


def test_a_users_model(monkeypatch):
    config = Config(model=f"{__name__}:mixed", tensor_parallel=2, **SIZES)
    monkeypatch.setattr("tf_dist.models.build.check", lambda *_: None)  # it would call the model
    whole, (own, _) = made(config, 2)
    assert [v.shape for v in whole.weights][1:3] == [(12, 48), (48,)]
    assert [v.shape for v in own.weights][1:3] == [(12, 24), (24,)]


def test_a_users_model_of_which_nothing_is_divided():
    config = Config(model=f"{__name__}:undivided", tensor_parallel=2, **SIZES)
    with pytest.raises(UsageError, match="is divided: let the function take a second argument"):
        build(config, tensor_parallel(rank_of(0, 2)))
    assert build(config)  # as where a run is read back
