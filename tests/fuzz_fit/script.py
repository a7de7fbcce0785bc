"""Writes a plan down as the script of a Keras user: ``python script.py SEED`` prints it.

The text is a function of the seed alone. With ``tests/oracle/plain_tf_dist.py`` in tf_dist's place the same
script is plain Keras.
"""

import random
import sys

import callbacks
import feeding
import losses
import models
from plan import plan_of

IMPORTS = [
    "import tf_dist",
    "",
    "comm = tf_dist.connect()",
    "",
    "import keras",
    "import numpy as np",
    "import pandas as pd",
    "import tensorflow as tf",
    "from keras import layers, ops",
]
SHRINK = """

class Shrink(layers.Layer):
    supports_masking = True

    def call(self, x):
        self.add_loss(0.01 * ops.{how}(ops.square(x)))
        return x
"""
BAG = f"""

class Bag(keras.Model):
    def __init__(self, head):
        super().__init__()
        self.embedding, self.head = layers.Embedding({models.WORDS}, 4), head

    def call(self, x):
        return self.head(ops.mean(self.embedding(x.to_tensor(shape=(None, {models.TOKENS}))), axis=1))
"""
WIDEST = """

class Widest(keras.metrics.Mean):
    def update_state(self, y, y_pred, sample_weight=None):
        return super().update_state(ops.max(ops.abs(y - y_pred), axis=-1), sample_weight)
"""
BODY = """
    def __init__(self, body):
        super().__init__()
        self.body = body

    def call(self, x, training=None):
        return self.body(x, training=training)
"""
COMPUTE_LOSS = """
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.01 * sum(ops.mean(ops.square(one)) for one in keras.tree.flatten(y_pred))
"""
GUIDE = """
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}
"""
UNPACK = """
    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight)
        gradients = tape.gradient(loss, self.trainable_variables)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        self.compute_metrics(x, y, y_pred, sample_weight)
        return self.get_metrics_result()
"""
OWN_LOSS = """
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = {loss}
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {{"loss": loss}}
"""
OWN_LOSSES = {
    "values": "ops.mean(ops.square(ops.cast(y, y_pred.dtype) - y_pred))",
    "binary": "ops.mean(keras.losses.binary_crossentropy(y, y_pred, from_logits={logits}))",
}


def script_of(seed):
    """The text of a seed's script."""
    plan, rng = plan_of(seed), random.Random(f"text {seed}")
    chosen = losses.loss(plan, rng)
    arguments = losses.compile_arguments(plan, rng, chosen)
    model = models.model(plan, rng, chosen.logits)
    if any("mask_zero=True" in line for line in model):  # Keras weighs a metric by the mask: no scalar
        arguments = [one.replace("masked_accuracy", '"accuracy"') for one in arguments]
    examples = models.data(plan, rng)
    if chosen.one_hot:
        examples.insert(-1, f"    y = keras.utils.to_categorical(y, {models.CLASSES})")
    text = " ".join(model + arguments)
    more = f", {plan.more}" if plan.more else ""
    rate = (
        "SGD(0.005" if 'reduction="sum"' in text else "SGD(0.05"
    )  # a sum of rows diverges by the rate of a mean
    optimizer = f"keras.optimizers.{plan.optimizer[:-1]}{more})".replace("SGD(0.05", rate)
    lines = [
        *IMPORTS, "", f"# seed {seed}: {_summary(plan)}",
        *([f'keras.config.set_floatx("{plan.dtype}")', f'keras.config.set_dtype_policy("{plan.dtype}")'] if plan.dtype != "float32" else []),
        f"keras.utils.set_random_seed({seed})", f"numbers = np.random.default_rng({seed})",
        f"by_value = {plan.extra not in ('dropout', 'noise')}",
        *_classes(plan, chosen, text, rng), *losses.functions(text), *examples, "", "",
        *feeding.data(plan), *model,
        f"optimizer = tf_dist.distribute({optimizer}, comm)",
        f"model.compile(optimizer, {', '.join(arguments)})",
        *callbacks.lines(plan, rng), *feeding.fit(plan, rng), *feeding.results(plan, rng), *callbacks.results(plan),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _summary(plan):
    said = (
        plan.task, plan.form, plan.step and f"train_step {plan.step}", plan.extra, plan.weights and f"{plan.weights} weights",
        plan.validation and f"validation {plan.validation}", plan.more, plan.compile, plan.dtype,
        f"{plan.rows} rows in batches of {plan.batch}", *plan.callbacks,
    )  # fmt: skip
    return ", ".join(one for one in said if one)


def _classes(plan, chosen, text, rng):
    """Definitions of the classes that a script names."""
    found = []
    if "Shrink()" in text:
        found.append(SHRINK.format(how=rng.choice(("mean", "mean", "sum"))))
    if plan.task == "ragged":
        found.append(BAG)
    if "Widest()" in text:
        found.append(WIDEST)
    parts = [BODY] if plan.style == "subclass" else []
    if plan.step == "own loss":
        given = "ops.mean(keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits={logits}))"
        if chosen.one_hot:
            given = "ops.mean(keras.losses.categorical_crossentropy(y, y_pred, from_logits={logits}))"
        parts.append(OWN_LOSS.format(loss=OWN_LOSSES.get(plan.task, given).format(logits=chosen.logits)))
    elif plan.step:
        parts.append({"guide": GUIDE, "unpack": UNPACK, "compute_loss": COMPUTE_LOSS}[plan.step])
    if plan.task != "ragged":
        found.append("\n\nclass Model(keras.Model):" + "".join(parts or ["\n    pass\n"]))
    return "".join(found).rstrip("\n").split("\n")


if __name__ == "__main__":
    print(script_of(int(sys.argv[1])), end="")
