"""Frozen weights and LoRA adapters of models on one rank."""

import dataclasses

import keras
import numpy as np
import pytest

from tf_dist.config import Config
from tf_dist.config.fine_tuning import untuned
from tf_dist.errors import UsageError
from tf_dist.models import freezing, lora
from tf_dist.models.build import build
from tf_dist.models.fine_tuning import trained_parameters

SMALL = Config(layers=2, width=16, heads=2, seq_len=8, vocab_size=29, seed=3)
IDS = np.random.default_rng(1).integers(0, 29, (3, 8)).astype(np.int32)


def logits(model):
    return np.asarray(keras.ops.cast(model(IDS, training=False), "float32"))


def tuned(**options):
    return dataclasses.replace(SMALL, **options)


def by_path(model):
    return {variable.path: variable for variable in model.weights}


def test_frozen_weights_are_not_trained_and_keep_their_place():
    plain, model = build(SMALL), build(tuned(freeze="layer_0_*,embedding"))
    assert [v.path for v in model.weights] == [v.path for v in plain.weights]
    frozen = {v.path for v in model.weights if not v.trainable}
    assert frozen == {path for path in by_path(plain) if path.startswith(("layer_0_", "embedding"))}
    assert not {v.path for v in model.trainable_variables} & frozen
    np.testing.assert_array_equal(logits(model), logits(plain))
    parameters, total = trained_parameters(model)
    assert total == plain.count_params() and parameters < total / 2 + 1000


def test_all_frozen_is_an_error():
    with pytest.raises(UsageError, match=r"freezes all 28 weights of the model"):
        build(tuned(freeze="*"))


def test_statistics_of_a_frozen_layer_stand_still():
    inputs = keras.Input((4,))
    norm = keras.layers.BatchNormalization(name="norm")
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(norm(inputs)))
    assert freezing.freeze(model, "norm/gamma") == 1
    assert norm.trainable  # only a part of it
    assert freezing.freeze(model, "norm") == 1
    assert not norm.trainable
    model(np.ones((2, 4), np.float32), training=True)
    np.testing.assert_array_equal(np.asarray(norm.moving_mean.value), 0)
    assert [v.path for v in model.trainable_variables] == ["head/kernel", "head/bias"]


@pytest.mark.parametrize("model", ["transformer", "lstm"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapters_begin_as_nothing_and_can_be_merged(model, precision):
    config = tuned(model=model, lora_rank=3, lora_alpha=6.0, precision=precision)
    plain, adapted = build(untuned(config)), build(config)
    np.testing.assert_array_equal(logits(adapted), logits(plain))
    rng = np.random.default_rng(1)
    for path, variable in by_path(adapted).items():
        assert variable.trainable == ("_lora_" in path)
        if path.endswith("_lora_b"):
            variable.assign(rng.normal(size=variable.shape).astype(np.float32))
    assert np.abs(logits(adapted) - logits(plain)).max() > 0.01
    weights = by_path(adapted)

    def read(path):
        return np.asarray(weights[path].value)

    for path, variable in by_path(plain).items():
        variable.assign(lora.merged(path, read, weights, 2.0))
    tolerance = 1e-5 * max(1.0, np.abs(logits(plain)).max()) if precision == "float32" else 0.5
    np.testing.assert_allclose(logits(adapted), logits(plain), rtol=0, atol=tolerance)


def test_adapters_of_targets_only():
    model = build(tuned(lora_rank=2, lora_targets="query_key_value,!layer_0_*"))
    assert [v.path for v in model.trainable_variables] == [
        "layer_1_attention/query_key_value/kernel_lora_a",
        "layer_1_attention/query_key_value/kernel_lora_b",
    ]
    assert trained_parameters(model)[0] == 2 * (16 + 48)


def test_a_kernel_that_is_trained_needs_no_adapter():
    model = build(tuned(lora_rank=2, freeze="*,!layer_1_feed_forward_out"))
    trained = {v.path for v in model.trainable_variables}
    assert {"layer_1_feed_forward_out/kernel", "layer_1_feed_forward_out/bias"} < trained
    assert "layer_1_feed_forward_out/kernel_lora_a" not in trained and len(trained) == 2 + 2 * 7


def test_initial_adapters_depend_on_seed_and_path_alone():
    one, other = (by_path(build(tuned(lora_rank=2, lora_targets=t))) for t in ("*", "layer_1_*"))
    seed = by_path(build(tuned(lora_rank=2, seed=4)))
    name = "layer_1_feed_forward_in/kernel_lora_a"
    np.testing.assert_array_equal(np.asarray(one[name].value), np.asarray(other[name].value))
    assert (np.asarray(one[name].value) != np.asarray(seed[name].value)).all()
    assert float(np.asarray(one[name].value).std()) == pytest.approx(16**-0.5, rel=0.3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"lora_rank": 17},
            "lora-rank 17 is more than kernel .* of shape 16 x ",
        ),
        ({"lora_rank": 2, "lora_targets": "embedding"}, "--lora-targets 'embedding' matches no weight"),
        ({"lora_rank": 2, "freeze": "embedding"}, "has no frozen kernel to adapt"),
        ({"freeze": "layer_7_*"}, "--freeze 'layer_7_\\*' matches no weight"),
    ],
)
def test_refused(options, said):
    with pytest.raises(UsageError, match=said):
        build(tuned(**options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_alpha": 8.0}, "give --lora-rank"),
        ({"lora_rank": 1, "lora_alpha": 0.0}, "lora_alpha is 0"),
        ({"init_except": "head"}, "--init-from"),
        ({"layer_lr_decay": 0.0}, "layer_lr_decay is 0"),
        ({"layer_lr_decay": 1.5}, "at most 1"),
        ({"lr_scale": "embedding"}, "'embedding', which is not PATTERN=X"),
        ({"lr_scale": "a=1,b=0"}, "'b=0'"),
        ({"lr_scale": "a=nan"}, "'a=nan'"),
        ({"lr_scale": "a=-1"}, "--freeze"),
    ],
)
def test_options_that_cannot_be(options, said):
    with pytest.raises(UsageError, match=said):
        tuned(**options)
