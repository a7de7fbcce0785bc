"""Facts that ranks compare: what they must see, and what is of no matter. Legend: T tokens, V vocabulary."""

import inspect

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.keras_fit.api import distribute
from tf_dist.strategies import AllReduce, Compressed, DiLoCo, PowerSGD, Zero
from tf_dist.training import model_facts
from tf_dist.training.consistency_check import ConsistencyCheck
from tf_dist.training.loss_spikes import LossSpikes
from tf_dist.training.restart import with_restarts
from tf_dist.training.trainer import Trainer

T, V = 4, 6
TOKENS = np.arange(300) ** 2 % V


def model(end=None, activation="relu", function=None, rate=0.1, names=("left", "right")):
    tokens = keras.Input((T,), dtype="int32")
    x = layers.Dropout(rate)(layers.Embedding(V, 3)(tokens))
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(x)
    parts = [layers.Dense(3, activation, name=name)(x) for name in names]
    x = layers.Lambda(function or (lambda y: 2 * y))(keras.ops.add(*parts))
    return keras.Model(tokens, layers.Dense(V, end)(x))


def difference(one, other):
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def test_numbers_that_keras_gives_to_names_are_of_no_matter():
    first, again = model(), model()
    assert [v.path for v in first.weights] != [v.path for v in again.weights]
    assert model_facts.of_weights(first) == model_facts.of_weights(again)
    assert difference(model_facts.of_layers(first), model_facts.of_layers(again)) == []


def test_the_order_of_weights_is_seen():
    one, other = (model_facts.of_weights(model(names=names)) for names in (("p_1", "p_2"), ("p_2", "p_1")))
    assert len(difference(one, other)) == 4 and sorted(one.values()) == sorted(other.values())


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"activation": "tanh"}, "activation"), ({"rate": 0.2}, "rate"), ({"end": "softmax"}, "activation")],
)
def test_configurations_are_seen(changed, key):
    found = difference(model_facts.of_layers(model()), model_facts.of_layers(model(**changed)))
    assert found and all(one.endswith(key) for one in found)


def test_functions_are_seen_by_what_they_do():
    def scaled(factor):
        return lambda y: factor * y

    one, same, other = (model_facts.of_layers(model(function=scaled(n))) for n in (2, 2, 3))
    assert difference(one, same) == [] and len(difference(one, other)) == 1


def test_classes_of_users_may_say_nothing_of_themselves():
    class Own(layers.Layer):
        def __init__(self, scale, table):
            super().__init__()
            self.scale, self.table = scale, table

        def call(self, x):
            return self.scale * x

    def own(scale):
        return keras.Sequential(
            [keras.Input((T,), dtype="int32"), layers.Embedding(V, V), Own(scale, object())]
        )

    assert difference(model_facts.of_layers(own(1.0)), model_facts.of_layers(own(1.0))) == []
    assert difference(model_facts.of_layers(own(1.0)), model_facts.of_layers(own(2.0)))[0].endswith("scale")


def test_optimizers_and_schedules():
    cosine = keras.optimizers.schedules.CosineDecay
    found = [
        model_facts.of_optimizer(keras.optimizers.Adam(cosine(0.1, steps), beta_1=beta))
        for steps, beta in ((100, 0.9), (100, 0.9), (200, 0.8))
    ]
    assert found[0] == found[1]
    assert {"beta_1", "learning_rate.config.decay_steps", "learning rate at step 10"} <= {
        *difference(found[0], found[2])
    }


def test_arrays_by_what_they_hold(monkeypatch):
    tokens = np.arange(1000, dtype=np.uint16)
    assert (
        model_facts.of_array(tokens)
        == model_facts.of_array(tokens.copy())
        != model_facts.of_array(tokens + 1)
    )
    assert model_facts.of_array(tokens) != model_facts.of_array(tokens.astype(np.uint32))
    monkeypatch.setattr(model_facts, "HASHED_BYTES", 100)
    monkeypatch.setattr(model_facts, "BLOCKS", 5)
    last = tokens.copy()
    last[-1] += 1
    assert model_facts.of_array(tokens) == model_facts.of_array(tokens.copy()) != model_facts.of_array(last)


# What a Trainer refuses --------------------------------------------------------------------------------


def trainer_of(model, *strategy, optimizer=None, **more):
    optimizer = optimizer or keras.optimizers.SGD(0.1)
    return Trainer(
        model, optimizer, SerialComm(), *strategy, clip_norm=0.0, global_batch_size=4, autotune="off", **more
    )


def test_a_model_that_ends_in_softmax():
    with pytest.raises(UsageError, match=r"probabilities.*softmax of a softmax.*without activation"):
        trainer_of(model("softmax")).fit(TOKENS, steps=1)
    assert trainer_of(model("log_softmax")).fit(TOKENS, steps=1)["loss"]


def test_a_distributed_optimizer():
    optimizer = distribute(keras.optimizers.Adam(), SerialComm())
    with pytest.raises(UsageError, match="this optimizer is distributed"):
        trainer_of(model(), optimizer=optimizer)


def test_a_loss_of_compile_is_not_used():
    compiled = model()
    compiled.compile("sgd", loss="mse")
    with pytest.warns(UserWarning, match="compiled with the loss mse"):
        trainer_of(compiled).fit(TOKENS, steps=1)


# Defaults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "others"),
    [
        # What a Trainer must be given, derives from the model, or has as a group. Its optimizer is
        # the user's, and may clip by itself; a command's is made with the flags.
        (Trainer.__init__, {"model", "optimizer", "seq_len", "compression", "clip_norm"}),
        # Arguments of one call, as Keras's fit has them: one pass, and no validation unasked.
        (Trainer.fit, {"steps", "epochs", "eval_every", "callbacks"}),
        (LossSpikes.__init__, set()),
        (ConsistencyCheck.__init__, {"check_every"}),
        (with_restarts, set()),
    ],
    ids=["Trainer", "fit", "LossSpikes", "ConsistencyCheck", "with_restarts"],
)
def test_options_have_the_defaults_of_their_flags(function, others):
    own, flags = inspect.signature(function).parameters, Config().as_dict()
    assert {name for name in own if name in flags and own[name].default != flags[name]} <= others


def test_spikes_have_the_defaults_of_their_flags():
    spikes, flags = LossSpikes(), Config()
    assert (spikes.factor, spikes.skip) == (flags.spike_factor, flags.spike_skip)


def test_diloco_has_the_outer_optimizer_of_the_flag():
    made = trainer_of(model(), "diloco").strategy
    assert (made.outer_lr, made.outer_momentum, made.plan.sync_every) == (0.7, 0.9, 50)
    made = trainer_of(model(), "local-sgd").strategy
    assert (made.outer_lr, made.outer_momentum, made.plan.sync_every) == (1.0, 0.0, 8)


def test_a_name_a_keyword_its_older_name_and_an_object_are_one_road():
    ways = [
        trainer_of(model(), "diloco", local={"outer_lr": 0.5}),
        trainer_of(model(), strategy="diloco", local={"outer_lr": 0.5}),
        trainer_of(model(), update="diloco", local={"outer_lr": 0.5}),
        trainer_of(model(), DiLoCo(outer_lr=0.5)),
        trainer_of(model(), Config(strategy="diloco", outer_lr=0.5).chosen_strategy()),
        trainer_of(model(), "tf_dist.strategies:DiLoCo"),
    ]
    assert [type(one.strategy) for one in ways] == [DiLoCo] * 6
    assert [one.strategy.options for one in ways[:5]] == [DiLoCo.Options(outer_lr=0.5)] * 5


@pytest.mark.parametrize(
    ("group", "given", "strategy", "said"),
    [
        ("local", {"outer_lrs": 1}, "diloco", "no option 'outer_lrs'.*Did you mean 'outer_lr'"),
        ("local", {"outer_lr": -1.0}, "diloco", "at least 0"),
        (
            "local",
            {"sync_every": 3},
            "allreduce",
            "sync_every is 3, but strategy allreduce has no use",
        ),
        ("local", {"sync_every": 3}, DiLoCo(), "sync_every beside an object of strategy diloco: give them"),
        ("compression", {"compression_rank": 2}, "allreduce", "belongs to compression powersgd"),
        ("compression", {"compression": "zip"}, "allreduce", "choose one of"),
        (
            "compression",
            {"compression": "topk"},
            AllReduce(),
            "compression beside an object of strategy",
        ),
        ("pipeline", {"recompute": "yes"}, "allreduce", "choose one of"),
    ],
)
def test_options_that_mean_nothing(group, given, strategy, said):
    with pytest.raises(UsageError, match=said):
        trainer_of(model(), strategy, **{group: given})


def test_an_object_is_for_one_trainer():
    strategy = DiLoCo()
    trainer_of(model(), strategy)
    with pytest.raises(UsageError, match="strategy diloco has been given to a Trainer: make a new one"):
        trainer_of(model(), strategy)


def test_an_option_that_an_object_does_not_have():
    with pytest.raises(UsageError, match=r"diloco has no option 'outer_lrs'.*Did you mean 'outer_lr'"):
        DiLoCo(outer_lrs=1)
    with pytest.raises(UsageError, match=r"powersgd has no option 'ranks'.*Did you mean 'rank'"):
        Compressed(AllReduce(), PowerSGD(ranks=4))
    with pytest.raises(UsageError, match="only sums of strategies allreduce, local-sgd and diloco"):
        Compressed(Zero(), PowerSGD())
    for given in ({"outer_fragments": 2}, {"outer_delay": 1}, {"outer_precision": "bfloat16"}):
        with pytest.raises(UsageError, match=f"compression powersgd with {next(iter(given))}"):
            Compressed(DiLoCo(**given), PowerSGD())
