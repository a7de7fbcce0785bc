"""Steps in blocks against Keras's own. Legend: P parameters, N variables."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.checkpoint.store import load, newest
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import UsageError
from tf_dist.optim import elementwise, fused_optimizer
from tf_dist.optim.elementwise import slots_of, why_not
from tf_dist.optim.fused_optimizer import BlockStep, VariableStep
from tf_dist.training.state_dict import restore, save
from tf_dist.training.trainer import Trainer

K = keras.optimizers
# Of ranks 0 to 3; sizes that are no multiple of a cache line, and one that is.
SHAPES = [(7, 5), (5,), (5, 40), (), (2, 3, 4), (16, 8)]
P = sum(int(np.prod(shape)) for shape in SHAPES)
STEPS = 5
# Sums of a product are rounded once by XLA, and twice by TensorFlow: some units in the last place.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

MAKE = {
    "sgd": lambda **more: K.SGD(0.1, **more),
    "momentum": lambda **more: K.SGD(0.1, momentum=0.9, **more),
    "nesterov": lambda **more: K.SGD(0.1, momentum=0.9, nesterov=True, **more),
    "rmsprop": lambda **more: K.RMSprop(0.01, **more),
    "rmsprop-centered": lambda **more: K.RMSprop(0.01, momentum=0.9, centered=True, **more),
    "adam": lambda **more: K.Adam(0.01, **more),
    "amsgrad": lambda **more: K.Adam(0.01, amsgrad=True, **more),
    "adamw": lambda **more: K.AdamW(0.01, **{"weight_decay": 0.1, **more}),
    "adamw-amsgrad": lambda **more: K.AdamW(0.01, amsgrad=True, **more),
    "adamax": lambda **more: K.Adamax(0.01, **more),
    "nadam": lambda **more: K.Nadam(0.01, **more),
    "adagrad": lambda **more: K.Adagrad(0.01, **more),
    "adadelta": lambda **more: K.Adadelta(0.5, **more),
    "ftrl": lambda **more: K.Ftrl(0.05, l1_regularization_strength=0.01, beta=0.1, **more),
    "lion": lambda **more: K.Lion(0.01, **more),
}
if hasattr(K, "ScheduleFreeAdamW"):
    MAKE["schedule-free"] = lambda **more: K.ScheduleFreeAdamW(0.01, **more)
# TensorFlow makes x * rsqrt(y) of x / sqrt(y) in these, and its rsqrt is another one for the last elements of
# an array: without XLA, where an element lies shows in its last bit.
BY_RSQRT = ("rmsprop", "adadelta", "adagrad")


# Of those that differ in a switch, others remain.
ALIKE = ("sgd", "momentum", "rmsprop", "amsgrad", "adam")
MANY = [pytest.param(name, marks=[pytest.mark.extended] * (name in ALIKE)) for name in MAKE]


class Mine(K.Optimizer):
    """A user's: momentum, and a factor for each weight that his own operators make."""

    elementwise = True

    def build(self, variables):
        super().build(variables)
        self.speeds = self.add_optimizer_variables(variables, "speed")

    def update_step(self, gradient, variable, learning_rate):
        speed = self.speeds[self._get_variable_index(variable)]
        self.assign(speed, 0.5 * speed + gradient / (1.0 + abs(variable) ** 2.0))
        self.assign_sub(variable, learning_rate * speed.value - 0.001 * variable)


def variables_of(seed=0):
    random = np.random.default_rng(seed)
    return [
        keras.Variable(random.normal(size=shape).astype(np.float32), name=f"v{i}")
        for i, shape in enumerate(SHAPES)
    ]


def pair(make, excluding=True):
    """Variables and an optimizer for them."""
    variables, optimizer = variables_of(), make()
    if excluding and optimizer.weight_decay is not None:
        optimizer.exclude_from_weight_decay(var_list=[v for v in variables if len(v.shape) < 2])
    optimizer.build(variables)
    return variables, optimizer


def gradients(seed=1):
    random = np.random.default_rng(seed)
    return [tf.constant(random.normal(size=P, scale=0.1).astype(np.float32)) for _ in range(STEPS)]


def state(*variables):
    return np.concatenate([np.asarray(variable.numpy(), np.float64).ravel() for variable in variables])


def trained(make, step_of, excluding=True):
    variables, optimizer = pair(make, excluding)
    step = step_of(optimizer, variables)
    for gradient in gradients():
        step.apply(gradient, np.float32(0.5))
    return state(*variables), state(*optimizer.variables)


def blocks(**more):
    return lambda optimizer, variables: BlockStep(optimizer, variables, **more)


# Numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MANY)
def test_alone_and_not_fused_the_bits_are_keras_own(name):
    for expected, found in zip(
        trained(MAKE[name], VariableStep), trained(MAKE[name], blocks(fused=False, alone_from=0)), strict=True
    ):
        np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("name", [name for name in MAKE if not name.startswith(BY_RSQRT)])
def test_together_and_not_fused_the_bits_are_keras_own(name):
    for expected, found in zip(
        trained(MAKE[name], VariableStep), trained(MAKE[name], blocks(fused=False)), strict=True
    ):
        np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("name", MANY)
def test_fused_the_numbers_are_keras_own(name):
    for expected, found in zip(trained(MAKE[name], VariableStep), trained(MAKE[name], blocks()), strict=True):
        np.testing.assert_allclose(found, expected, **CLOSE)


# Every kind of arithmetic that the optimizers have, once: each of these tests compiles some programs.
KINDS = ("nesterov", "rmsprop-centered", "adamw-amsgrad", "nadam", "adadelta", "ftrl", "lion")


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("adamw-amsgrad", "nadam") else pytest.param(name, marks=pytest.mark.extended)
        for name in KINDS
    ],
)
def test_how_blocks_are_cut_changes_no_bit(name, monkeypatch):
    together = trained(MAKE[name], blocks())
    for one, other in zip(together, trained(MAKE[name], blocks(alone_from=100)), strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(fused_optimizer, "TOGETHER", 150)
    step = BlockStep(*reversed(pair(MAKE[name])))
    assert len(step._groups) > 1
    for one, other in zip(together, trained(MAKE[name], blocks()), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", KINDS)
def test_fused_the_bits_are_those_of_variables_fused(name):
    """Runs of large models, begun before there were blocks, go on in their bits."""
    expected = trained(MAKE[name], lambda *both: VariableStep(*both, fused=True))
    for one, other in zip(expected, trained(MAKE[name], blocks()), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.extended)])
def test_a_shard_of_the_flat_vector_steps_by_itself(name, fused):
    """What ZeRO needs: the update of a stretch of weights is that stretch of the update, to the last bit."""
    if not fused and name.startswith(BY_RSQRT):
        pytest.skip("rsqrt, see above")
    weights, optimizer = keras.Variable(np.linspace(-1, 1, P, dtype=np.float32)), MAKE[name]()
    optimizer.build([weights])

    @tf.function(jit_compile=fused)
    def update(gradient, weights, slots):
        rate = tf.constant(0.01)
        return elementwise.update(
            optimizer, gradient, weights, slots, rate, optimizer.weight_decay is not None
        )

    random = np.random.default_rng(2)
    slots = {name: tf.constant(random.uniform(0.1, 1, P).astype(np.float32)) for name in slots_of(optimizer)}
    gradient, values = gradients()[0], tf.constant(weights.numpy())
    whole, has_all_slots = update(gradient, values, slots)
    for start, stop in ((0, 13), (13, 300), (300, P)):
        part = {name: slot[start:stop] for name, slot in slots.items()}
        shard, shard_slots = update(gradient[start:stop], values[start:stop], part)
        np.testing.assert_array_equal(shard, whole[start:stop])
        for name, slot in shard_slots.items():
            np.testing.assert_array_equal(slot, has_all_slots[name][start:stop])


@pytest.mark.parametrize(
    ("options", "excluding"),
    [
        ({"clipvalue": 0.02}, True),
        ({"loss_scale_factor": 4.0}, True),
        ({"weight_decay": 0.3}, True),
        ({"weight_decay": 0.3}, False),
        ({"weight_decay": 0.0}, False),
    ],
    ids=str,
)
def test_options_of_every_optimizer(options, excluding):
    for expected, found in zip(
        trained(lambda: K.Adam(0.01, **options), VariableStep, excluding),
        trained(lambda: K.Adam(0.01, **options), blocks(fused=False), excluding),
        strict=True,
    ):
        np.testing.assert_array_equal(expected, found)


def test_exclusion_from_weight_decay_by_name():
    found = []
    for step_of in (VariableStep, blocks(fused=False)):
        variables, optimizer = variables_of(), K.AdamW(0.01, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["v4", "v1"])
        optimizer.build(variables)
        step_of(optimizer, variables).apply(tf.zeros(P), np.float32(1))
        found.append(state(*variables))
        before = variables_of()
        unchanged = [np.array_equal(v.numpy(), old.numpy()) for v, old in zip(variables, before, strict=True)]
        assert [i for i, same in enumerate(unchanged) if same] == [1, 4]
    np.testing.assert_array_equal(*found)


def test_a_users_optimizer_that_says_it_is_elementwise():
    assert not why_not(*reversed(pair(lambda: Mine(0.1))))
    for step_of, compare in (
        (blocks(fused=False), np.testing.assert_array_equal),
        (blocks(), lambda a, b: np.testing.assert_allclose(a, b, **CLOSE)),
    ):
        for expected, found in zip(
            trained(lambda: Mine(0.1), VariableStep), trained(lambda: Mine(0.1), step_of), strict=True
        ):
            compare(found, expected)


# Learning rates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rate", [K.schedules.CosineDecay(0.1, 2 * STEPS), lambda: 0.05], ids=["schedule", "callable"]
)
def test_schedules(rate):
    for expected, found in zip(
        trained(lambda: K.Adam(rate), VariableStep),
        trained(lambda: K.Adam(rate), blocks(fused=False)),
        strict=True,
    ):
        np.testing.assert_array_equal(expected, found)


def test_a_learning_rate_that_is_assigned_between_steps():
    found = []
    for step_of in (VariableStep, blocks(fused=False)):
        variables, optimizer = pair(MAKE["adamw"])
        step = step_of(optimizer, variables)
        for gradient, rate in zip(gradients(), (0.1, 0.1, 0.02, 0.5, 0.0), strict=True):
            optimizer.learning_rate = rate
            step.apply(gradient, np.float32(1))
        found.append(state(*variables, *optimizer.variables))
        assert int(optimizer.iterations) == STEPS
    np.testing.assert_array_equal(*found)


# State --------------------------------------------------------------------------------------------


def test_state_is_where_keras_has_it_at_any_time():
    """Read, written and saved through the optimizer's own variables, which stay the same objects."""
    variables, optimizer = pair(MAKE["adam"])
    held, config = optimizer.variables, optimizer.get_config()
    others, other = pair(MAKE["adam"])
    step, keras_own = BlockStep(optimizer, variables, fused=False), VariableStep(other, others)
    for gradient in gradients():
        step.apply(gradient, np.float32(1))
        keras_own.apply(gradient, np.float32(1))
        for mine, theirs in zip(optimizer.variables, other.variables, strict=True):
            np.testing.assert_array_equal(np.asarray(mine.value), np.asarray(theirs.value))
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(mine), theirs.numpy())
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    assert all(mine is one for mine, one in zip(held, optimizer.variables, strict=True))
    assert optimizer.get_config() == config
    mine, theirs = {}, {}
    optimizer.save_own_variables(mine)
    other.save_own_variables(theirs)
    assert [np.array_equal(mine[key], theirs[key]) for key in theirs] == [True] * len(mine)


def test_tensorflows_checkpoints_while_state_is_lent(tmp_path):
    variables, optimizer = pair(MAKE["adam"])
    step, checkpoint = BlockStep(optimizer, variables), tf.train.Checkpoint(optimizer=optimizer)
    step.apply(gradients()[0], np.float32(1))
    path, before = checkpoint.write(str(tmp_path / "saved")), state(*optimizer.variables)
    step.apply(gradients()[1], np.float32(1))
    assert (state(*optimizer.variables) != before).any()
    checkpoint.read(path)
    np.testing.assert_array_equal(state(*optimizer.variables), before)


def test_what_is_assigned_from_outside_is_used():
    """A checkpoint, `set_weights` of a callback, the consistency check: between any two steps."""
    found = []
    for step_of in (VariableStep, blocks(fused=False), blocks(fused=False, alone_from=100)):
        variables, optimizer = pair(MAKE["adam"])
        step = step_of(optimizer, variables)
        random = np.random.default_rng(3)
        for gradient in gradients():
            step.apply(gradient, np.float32(1))
            for variable in [*variables, *optimizer.variables[2:]]:
                variable.assign(random.uniform(0.1, 1, variable.shape))
            variables[2].assign_add(np.ones(SHAPES[2]))
            optimizer.variables[5].assign_add(np.ones(optimizer.variables[5].shape))
        step.apply(gradients()[0], np.float32(1))
        found.append(state(*variables, *optimizer.variables))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_state_from_before_is_taken_over_and_given_back():
    """Keras's own steps, blocks, Keras's own in a function traced before, and blocks again: one training."""
    first, *middle, fourth, fifth = gradients()
    ones = []
    for step_of in (VariableStep, blocks(fused=False)):
        variables, optimizer = pair(MAKE["nadam"])
        by_keras = VariableStep(optimizer, variables)
        by_keras.apply(first, np.float32(1))
        step = step_of(optimizer, variables)
        for gradient in middle:
            step.apply(gradient, np.float32(1))
        step.give_back()
        assert all(isinstance(variable.value, tf.Variable) for variable in optimizer.variables)
        by_keras.apply(fourth, np.float32(1))
        step.apply(fifth, np.float32(1))
        ones.append(state(*variables, *optimizer.variables))
    np.testing.assert_array_equal(*ones)


def test_two_steps_of_one_optimizer_take_turns():
    ones = []
    for step_of in (VariableStep, blocks(fused=False)):
        variables, optimizer = pair(MAKE["adam"])
        steps = [step_of(optimizer, variables), step_of(optimizer, variables)]
        for number, gradient in zip((0, 1, 1, 0, 1), gradients(), strict=True):
            steps[number].apply(gradient, np.float32(1))
        ones.append(state(*variables, *optimizer.variables))
    np.testing.assert_array_equal(*ones)


def test_keras_may_step_while_state_is_lent():
    first, second, third, *_ = gradients()
    ones = []
    for step_of in (VariableStep, blocks(fused=False)):
        variables, optimizer = pair(MAKE["adam"])
        step = step_of(optimizer, variables)
        step.apply(first, np.float32(1))
        pieces = tf.split(second, [int(np.prod(shape)) for shape in SHAPES])
        optimizer.apply([tf.reshape(*both) for both in zip(pieces, SHAPES, strict=True)], variables)
        step.apply(third, np.float32(1))
        ones.append(state(*variables, *optimizer.variables))
    np.testing.assert_array_equal(*ones)


def test_a_function_traced_with_lent_state_fails_and_does_not_train_on():
    variables, optimizer = pair(MAKE["adam"])
    by_keras, step = VariableStep(optimizer, variables), BlockStep(optimizer, variables)
    by_keras.apply(gradients()[0], np.float32(1))
    step.apply(gradients()[0], np.float32(1))
    with pytest.raises(tf.errors.InvalidArgumentError):
        by_keras.apply(gradients()[0], np.float32(1))


def test_weights_that_were_read_do_not_change():
    """Variables take their new values as parts of one array: what was read before must stay as it was."""
    variables, optimizer = pair(MAKE["adam"])
    step = BlockStep(optimizer, variables)
    step.apply(gradients()[0], np.float32(1))
    seen = [np.asarray(tf.convert_to_tensor(v.value)) for v in [*variables, *optimizer.variables]]
    copies = [array.copy() for array in seen]
    step.apply(gradients()[1], np.float32(1))
    variables[0].assign_add(np.ones(SHAPES[0]))
    assert not np.array_equal(state(*variables), np.concatenate([c.ravel() for c in copies[: len(SHAPES)]]))
    for array, copy in zip(seen, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_one_program_for_all_variables_of_a_shape():
    variables = [keras.Variable(np.ones((4, 3), np.float32), name=f"same{i}") for i in range(6)]
    variables += [keras.Variable(np.ones((5, 3), np.float32), name="another")]
    optimizer = K.Adam()
    optimizer.build(variables)
    step = BlockStep(optimizer, variables, alone_from=0)
    for _ in range(3):
        step.apply(tf.ones(6 * 12 + 15), np.float32(1))
    assert step._step.experimental_get_tracing_count() == 1
    assert step._in_place.experimental_get_tracing_count() == 2


# Which optimizers ---------------------------------------------------------------------------------


class Renamed(K.Adam):
    pass


class Clips(K.Adam):
    elementwise = True

    def _clip_gradients(self, grads):
        return [grad / 2 for grad in grads]


class Counts(K.Adam):
    elementwise = True

    def build(self, variables):
        super().build(variables)
        self.norms = self.add_variable((len(variables),), name="norms")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: K.Lamb(), "Lamb is not known to be elementwise"),
        (lambda: K.Adafactor(), "Adafactor is not known"),
        (lambda: K.Muon(), "Muon is not known"),
        (lambda: K.LossScaleOptimizer(K.Adam()), "LossScaleOptimizer is not known"),
        (lambda: Renamed(), "Renamed is not known"),
        (lambda: Clips(), "method _clip_gradients of its own"),
        (lambda: Counts(), "norms, which belongs to no single weight"),
        (lambda: K.Adam(clipnorm=1.0), "was given clipnorm"),
        (lambda: K.Adam(global_clipnorm=1.0), "was given global_clipnorm"),
        (lambda: K.Adam(use_ema=True), "was given use_ema"),
        (lambda: K.Adam(gradient_accumulation_steps=2), "was given gradient_accumulation_steps"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_others_step_each_variable_by_itself(make, reason):
    variables, optimizer = variables_of(), make()
    optimizer.build(variables)
    step = fused_optimizer.optimizer_step(optimizer, variables)
    assert isinstance(step, VariableStep)
    assert reason in step.reason
    before = state(*variables)
    for gradient in gradients()[:2]:
        step.apply(gradient, np.float32(1))
    assert (before != state(*variables)).any()


@pytest.mark.parametrize("what", ["constraint", "overwrite"])
def test_variables_with_ways_of_their_own(what):
    variables, optimizer = variables_of(), K.SGD(0.1)
    if what == "constraint":
        variables[4].constraint = keras.constraints.NonNeg()
    else:
        variables[4].overwrite_with_gradient = True
    optimizer.build(variables)
    step = fused_optimizer.optimizer_step(optimizer, variables)
    assert isinstance(step, VariableStep)
    assert "variable v4" in step.reason
    step.apply(gradients()[0], np.float32(1))
    start = sum(int(np.prod(shape)) for shape in SHAPES[:4])
    own = tf.reshape(gradients()[0][start : start + 24], SHAPES[4])
    expected = own if what == "overwrite" else np.maximum(variables_of()[4].numpy() - 0.1 * own, 0)
    np.testing.assert_allclose(variables[4].numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_keras_own_step_in_blocks(name):
    variables, optimizer = pair(MAKE[name])
    assert isinstance(fused_optimizer.optimizer_step(optimizer, variables), BlockStep)


def test_an_optimizer_of_another_model():
    _, optimizer = pair(MAKE["adam"])
    with pytest.raises(UsageError, match="built for other variables"):
        fused_optimizer.optimizer_step(optimizer, variables_of())


def test_an_optimizer_that_knows_more_variables():
    """Layers that were frozen after it was built: their state stays as it is."""
    found = []
    for step_of in (VariableStep, blocks(fused=False)):
        variables, optimizer = pair(MAKE["adamw"])
        used = [variables[i] for i in (4, 1, 5)]
        step = step_of(optimizer, used)
        for gradient in gradients():
            step.apply(gradient[: sum(int(np.prod(v.shape)) for v in used)], np.float32(1))
        found.append(state(*variables, *optimizer.variables))
    np.testing.assert_array_equal(*found)


# In a Trainer ------------------------------------------------------------------------------------


def trainer_of(optimizer):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,), dtype="int32"), keras.layers.Embedding(7, 8)])
    model.add(keras.layers.Dense(7, name="head"))
    return Trainer(
        model, optimizer, SerialComm(), clip_norm=0.0, global_batch_size=2, micro_batch_size=1, seq_len=4
    )


TEXT = np.random.default_rng(0).integers(0, 7, 200).astype(np.uint8)


def test_a_checkpoint_is_that_of_each_variable_by_itself(tmp_path):
    """Written in blocks and read by variables, and the other way round: the same names, shapes and values."""
    by_blocks = trainer_of(MAKE["adamw"]())
    assert isinstance(by_blocks.replica.optimizer_step, BlockStep)
    by_variables = trainer_of(MAKE["adamw"]())
    by_variables.replica.optimizer_step = VariableStep(
        by_variables.optimizer, by_variables.model.trainable_variables
    )
    names = []
    for trainer, other in ((by_blocks, by_variables), (by_variables, by_blocks)):
        trainer.fit(TEXT, steps=trainer.step - trainer.state.fitted + 3)
        sequences = trainer.sequences(TEXT)
        trainer.train_step(sequences, trainer.sampler(sequences))  # while state is lent
        save(trainer, tmp_path, 1, {})
        names.append([name.rpartition("/")[2] for name in load(newest(tmp_path))[0]])
        restore(other, newest(tmp_path))
        assert other.step == trainer.step
        for mine, theirs in zip(
            [*trainer.model.weights, *trainer.optimizer.variables],
            [*other.model.weights, *other.optimizer.variables],
            strict=True,
        ):
            np.testing.assert_array_equal(mine.numpy(), theirs.numpy())
        other.fit(TEXT, steps=other.step + 2)
    assert sum("kernel" in name for name in names[0]) == 3  # the weight, its momentum and its velocity


def test_the_optimizer_has_its_state_after_fit():
    trainer = trainer_of(MAKE["adam"]())
    trainer.fit(TEXT, steps=3)
    assert all(isinstance(variable.value, tf.Variable) for variable in trainer.optimizer.variables)
    assert all(np.abs(variable.numpy()).max() > 0 for variable in trainer.optimizer.variables)


def test_that_each_variable_steps_by_itself_is_said(told):
    trainer_of(K.Lamb()).fit(TEXT, steps=1)
    trainer_of(K.Adam()).fit(TEXT, steps=1)
    assert told.messages == [
        "optimizer: Lamb is not known to be elementwise, so it steps each variable by itself"
    ]
