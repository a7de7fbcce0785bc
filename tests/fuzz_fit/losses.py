"""Text of losses and metrics; what a loss takes (logits or probabilities, ids or one-hot rows) goes with it."""

from dataclasses import dataclass

FUNCTIONS = {
    "per_row": ["return ops.mean(ops.square(y - y_pred), axis=-1)"],
    "scalar": ["return ops.mean(ops.square(y - y_pred))"],
    "root": ["return ops.sqrt(ops.mean(ops.square(y - y_pred)))"],
    "masked_loss": [
        "loss = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)",
        "mask = ops.cast(ops.not_equal(y, 0), loss.dtype)",
        "return ops.sum(loss * mask) / ops.sum(mask)",
    ],
    "per_token": [
        "loss = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)",
        "return loss * ops.cast(ops.not_equal(y, 0), loss.dtype)",
    ],
    "largest": ["return ops.max(ops.abs(y - y_pred), axis=-1)"],
    "masked_accuracy": [
        "right = ops.cast(ops.equal(ops.cast(y, 'int32'), ops.cast(ops.argmax(y_pred, -1), 'int32')), 'float32')",
        "mask = ops.cast(ops.not_equal(y, 0), 'float32')",
        "return ops.sum(right * mask) / ops.sum(mask)",
    ],
}


@dataclass(frozen=True)
class Loss:
    """``text`` of compile's loss; ``logits`` or probabilities; ``one_hot`` targets."""

    text: str
    logits: bool = False
    one_hot: bool = False


VALUES = [
    Loss('"mse"'), Loss('"mse"'), Loss('"mae"'), Loss("keras.losses.Huber(0.5)"), Loss("keras.losses.LogCosh()"),
    Loss('keras.losses.MeanSquaredError(reduction="sum")'),
    Loss('keras.losses.MeanSquaredError(reduction="mean_with_sample_weight")'),
    Loss("keras.losses.MeanSquaredError(reduction=None)"),
    Loss("per_row"), Loss("scalar"), Loss("root"), Loss("keras.losses.MeanSquaredLogarithmicError()"),
]  # fmt: skip
CLASSES = [
    Loss('"sparse_categorical_crossentropy"'), Loss('"sparse_categorical_crossentropy"'),
    Loss("keras.losses.SparseCategoricalCrossentropy(from_logits=True)", logits=True),
    Loss("keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)", logits=True),
    Loss('keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")', logits=True),
    Loss("keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)", logits=True, one_hot=True),
    Loss("keras.losses.KLDivergence()", one_hot=True), Loss("keras.losses.CategoricalFocalCrossentropy()", one_hot=True),
]  # fmt: skip
BINARY = [
    Loss('"binary_crossentropy"'), Loss("keras.losses.BinaryCrossentropy(from_logits=True)", logits=True),
    Loss("keras.losses.BinaryFocalCrossentropy()"), Loss('"squared_hinge"', logits=True), Loss("keras.losses.Dice()"),
]  # fmt: skip
TOKENS = [
    Loss("keras.losses.SparseCategoricalCrossentropy(from_logits=True)", logits=True),
    Loss("keras.losses.SparseCategoricalCrossentropy(from_logits=True)", logits=True),
    Loss('"sparse_categorical_crossentropy"'),
    Loss("keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)", logits=True),
    Loss('keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")', logits=True),
    Loss('keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight")'),
    Loss("masked_loss", logits=True), Loss("per_token", logits=True),
]  # fmt: skip
OF_TASK = {"values": VALUES, "inputs": VALUES, "binary": BINARY, "tokens": TOKENS}
METRICS = {
    "values": ['"mae"', '"mse"', "keras.metrics.RootMeanSquaredError()", "largest", "keras.metrics.R2Score()", "Widest()"],
    "classes": ['"accuracy"', "keras.metrics.SparseTopKCategoricalAccuracy(2)"],
    "one hot": ['"accuracy"', "keras.metrics.AUC(multi_label=True)", 'keras.metrics.F1Score(average="macro")'],
    "binary": ['"accuracy"', "keras.metrics.AUC()", "keras.metrics.Precision()", "keras.metrics.Recall(thresholds=0.4)"],
    "tokens": ['"accuracy"', '"accuracy"', "masked_accuracy", "keras.metrics.SparseCategoricalCrossentropy(from_logits=True)"],
}  # fmt: skip


def loss(plan, rng):
    """The loss of a single output."""
    if plan.task == "outputs":
        logits = rng.random() < 0.5
        kind = f"keras.losses.SparseCategoricalCrossentropy(from_logits={logits})"
        value = rng.choice(('"mse"', "keras.losses.Huber(0.5)", "per_row", "scalar"))
        return Loss(_pair(plan, value, kind), logits=logits)
    own = [one for one in OF_TASK.get(plan.task, CLASSES) if not (one.one_hot and plan.weights == "class")]
    if plan.weights:  # a scalar has no rows to weigh
        own = [one for one in own if one.text not in ("scalar", "root", "masked_loss")]
    if plan.extra in ("penalty", "activity", "add_loss"):  # Keras cannot add a scalar to rows
        own = [one for one in own if "reduction=None" not in one.text]
    if plan.task == "values" and plan.step == "own loss":
        own = VALUES[:1]
    return rng.choice(own)


def _pair(plan, value, kind):
    return f'{{"value": {value}, "kind": {kind}}}' if plan.seed % 2 == 0 else f"[{value}, {kind}]"


def compile_arguments(plan, rng, chosen):
    """The arguments of compile but the optimizer."""
    words = [f"loss={chosen.text}"]
    if plan.task == "outputs":
        if rng.random() < 0.6:
            words.append("loss_weights=" + _pair(plan, "0.3", "2.0"))
        if rng.random() < 0.5:
            words.append("metrics=" + _pair(plan, '["mae"]', '["accuracy"]'))
    else:
        table = {"inputs": "values", "values": "values", "binary": "binary", "tokens": "tokens"}.get(
            plan.task, "classes"
        )
        choices = METRICS["one hot" if chosen.one_hot else table]
        picked = list(dict.fromkeys(rng.choices(choices, k=rng.choice((0, 1, 1, 2)))))
        if plan.dtype == "float64":
            mixed = ("keras.metrics.R2Score()", "keras.metrics.SparseTopKCategoricalAccuracy(2)")
            picked = [one for one in picked if one not in mixed]  # Keras mixes dtypes there
        if plan.step == "own loss":
            picked = []  # nobody would update them
        if plan.weighted_metrics and picked and picked[-1] != "masked_accuracy":  # a scalar has no weights
            words.append(f"weighted_metrics=[{picked.pop()}]")
        if picked:
            words.append(f"metrics=[{', '.join(picked)}]")
    if plan.compile:
        words.append(plan.compile)
    return words


def functions(text):
    """Definitions of the functions that a text names."""
    lines = []
    for name, body in FUNCTIONS.items():
        if name in text:
            lines += ["", "", f"def {name}(y, y_pred):", *("    " + line for line in body)]
    return lines
