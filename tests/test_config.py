import dataclasses
import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.config import Config, default_micro_batch
from tf_dist.errors import UsageError
from tf_dist.flags import GROUPS
from tf_dist.spelling import did_you_mean

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
WITH_LEAST = {name: f.metadata["least"] for name, f in FIELDS.items() if f.metadata["least"] is not None}
WITH_CHOICES = {name: f.metadata["choices"] for name, f in FIELDS.items() if f.metadata["choices"]}


def refusal(**values):
    with pytest.raises(UsageError) as caught:
        Config(**values)
    assert caught.value.exit_code == 64
    return str(caught.value)


def test_defaults_are_a_valid_run():
    config = Config()
    assert config.data == ("stdlib",)
    assert config.micro_batches * config.micro_batch_rows == config.global_batch_size


def test_it_is_frozen_and_defaults_are_not_shared():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().steps = 3
    assert Config().optimizer_args is not Config().optimizer_args


def test_every_option_has_a_heading_and_a_meaning():
    for field in FIELDS.values():
        assert field.metadata["group"] in GROUPS
        assert field.metadata["text"]


@pytest.mark.parametrize("name", WITH_LEAST)
def test_too_small(name):
    least = WITH_LEAST[name]
    assert f"{name} is {least - 1}: it must be at least {least}" in refusal(**{name: least - 1})


@pytest.mark.parametrize("name", [name for name in WITH_LEAST if isinstance(FIELDS[name].default, float)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(name, value):
    assert name in refusal(**{name: value})


@pytest.mark.parametrize("name", WITH_CHOICES)
def test_choices(name):
    wrong = WITH_CHOICES[name][-1] + "x"
    text = refusal(**{name: wrong})
    assert f"{name} is {wrong!r}: choose one of {', '.join(WITH_CHOICES[name])}" in text
    assert f"Did you mean {WITH_CHOICES[name][-1]!r}?" in text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"val_fraction": 1.0}, "leaves nothing to train on; use 0.1"),
        ({"dropout": 1.0}, "drops everything"),
        ({"global_batch_size": 12, "micro_batch_size": 5}, "Divisors: 1, 2, 3, 4, 6, 12"),
        ({"width": 10, "heads": 4}, "heads 4 does not divide width 10"),
        ({"steps": 5, "epochs": 2}, "leave one at 0"),
        ({"model": "transfomer"}, "Did you mean 'transformer'?"),
        ({"model": "gru"}, "transformer, lstm or package.module:function"),
    ],
)
def test_values_that_cannot_hold_together(values, text):
    assert text in refusal(**values)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"tensor_parallel": 3},
            "tensor_parallel 3 does not divide heads 4 (4 = 1 x 3 + 1). Nearest that do: 2 and 4; or let "
            "heads be 6",
        ),
        ({"tensor_parallel": 8}, "(4 = 0 x 8 + 4). Nearest that do: 2 and 4; or let heads be 8"),
        (
            {"model": "lstm", "width": 100, "tensor_parallel": 8},
            "tensor_parallel 8 does not divide width 100 (100 = 12 x 8 + 4). Nearest that do: 5 and 10; or "
            "let width be 104",
        ),
        (
            {"sequence_parallel": 6},
            "sequence_parallel 6 does not divide seq_len 64 (64 = 10 x 6 + 4). Nearest that do: 4 and 8; or "
            "let seq_len be 66",
        ),
        ({"model": "lstm", "sequence_parallel": 2}, "cannot be shared with model lstm: each step of an LSTM"),
        ({"model": "mine:build", "sequence_parallel": 2}, "it has its own layers"),
        ({"sequence_parallel": 2, "dropout": 0.1}, "with dropout 0.1: ranks that share a row would draw"),
        (
            {"pipeline_parallel": 5},
            "pipeline_parallel 5 is more than layers 4: each stage needs one. Use pipeline_parallel at most "
            "4, or layers 5 or more",
        ),
        (
            {"pipeline_parallel": 4, "pipeline_schedule": "interleaved"},
            "pipeline_parallel 4 x virtual_stages 2 = 8 stages is more than layers 4: each stage needs one. "
            "Use pipeline_parallel at most 2, or layers 8 or more",
        ),
        (
            {"pipeline_parallel": 2, "pipeline_schedule": "interleaved", "virtual_stages": 5},
            "Use another pipeline_schedule, or layers 10 or more",
        ),
        ({"zero_stage": 4}, "zero_stage is 4: it must be at most 3"),
        (
            {"strategy": "zero", "zero_stage": 2, "tensor_parallel": 2, "pipeline_parallel": 2},
            "zero_stage 2 with tensor_parallel 2 and pipeline_parallel 2",
        ),
        ({"strategy": "zero", "zero_stage": 3, "pipeline_parallel": 2}, "Use zero_stage 1"),
        (
            {"strategy": "zero", "zero_stage": 2, "sequence_parallel": 2},
            "zero_stage 2 with sequence_parallel 2",
        ),
        ({"sequence_parallel": 2, "pipeline_parallel": 4}, "sequence_parallel 2 with pipeline_parallel 4: "),
        ({"backend": "horovod", "tensor_parallel": 2}, "backend horovod cannot carry tensor_parallel 2: use"),
        (
            {"backend": "horovod", "sequence_parallel": 2, "strategy": "zero"},
            "cannot carry sequence_parallel 2 and strategy zero",
        ),
    ],
)
def test_degrees_that_do_not_fit(values, text):
    assert text in refusal(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"tensor_parallel": 4, "sequence_parallel": 8},
        {"tensor_parallel": 4, "pipeline_parallel": 4},
        {"pipeline_parallel": 2, "pipeline_schedule": "interleaved"},
        {"virtual_stages": 8},  # nothing is interleaved
        {"model": "lstm", "width": 6, "tensor_parallel": 3, "pipeline_parallel": 2, "dropout": 0.1},
        {"model": "mine:build", "tensor_parallel": 3, "pipeline_parallel": 7},  # its layers know
        {"strategy": "zero", "zero_stage": 1, "sequence_parallel": 2},
        {"strategy": "zero", "tensor_parallel": 2, "pipeline_parallel": 2},
        {"zero_stage": 3, "tensor_parallel": 2},  # not used
    ],
)
def test_degrees_that_fit(values):
    Config(**values)


def test_a_seed_that_numpy_and_keras_cannot_take():
    # keras.utils.set_random_seed, and numpy under it, take 32 bits.
    assert Config(seed=2**32 - 1).seed == 2**32 - 1
    assert "seed" in refusal(seed=2**32)


def test_the_width_of_an_lstm_needs_no_heads():
    assert Config(model="lstm", width=10, heads=4).width == 10
    assert Config(model="package.module:build", width=10, heads=4).width == 10


@given(st.integers(1, 500))
def test_micro_batch_that_is_chosen(global_batch_size):
    rows = default_micro_batch(global_batch_size)
    assert global_batch_size % rows == 0
    assert global_batch_size // rows >= min(4, global_batch_size)
    better = [n for n in range(rows + 1, global_batch_size // 4 + 1) if global_batch_size % n == 0]
    assert not better
    config = Config(global_batch_size=global_batch_size)
    assert (config.micro_batch_rows, config.micro_batches) == (rows, global_batch_size // rows)


def test_micro_batch_that_is_given():
    config = Config(global_batch_size=12, micro_batch_size=6)
    assert (config.micro_batch_rows, config.micro_batches) == (6, 2)


def test_as_yaml_holds_every_field_in_order():
    config = Config(data=("a.txt", "b.txt"), optimizer_args={"beta_2": 0.99})
    values = yaml.safe_load(config.as_yaml())
    assert list(values) == list(FIELDS)
    assert values["data"] == ["a.txt", "b.txt"]
    assert values["optimizer_args"] == {"beta_2": 0.99}


def test_did_you_mean():
    assert did_you_mean("cosin", ("linear", "cosine")) == ". Did you mean 'cosine'?"
    assert did_you_mean("xyz", ("linear", "cosine")) == ""
