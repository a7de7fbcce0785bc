"""Text of the data and the model of each task."""

TOKENS = 8  # T, positions of a sequence
WORDS = 11  # V, ids; 0 is padding
CLASSES = 3


def data(plan, rng):
    """A function ``examples(rows)`` that gives ``x, y``."""
    return [
        "",
        "",
        "def examples(rows):",
        *("    " + line for line in DATA[plan.task](plan, rng)),
        "    return x, y",
    ]


def _values(plan, rng):
    return [
        f'x = numbers.normal(size=(rows, 4)).astype("{plan.dtype}")',
        "y = np.sin(x).sum(axis=1, keepdims=True)",
    ]


def _images(plan, rng):
    return [
        f'x = numbers.normal(size=(rows, 6, 6, 2)).astype("{plan.dtype}")',
        f'y = (np.abs(x).sum(axis=(1, 2, 3)) * 7).astype("int32") % {CLASSES}',
    ]


def _classes(plan, rng):
    return [
        f'x = numbers.normal(size=(rows, 4)).astype("{plan.dtype}")',
        f'y = numbers.integers({CLASSES}, size=rows).astype("int32")',
    ]


def _binary(plan, rng):
    return [
        f'x = numbers.normal(size=(rows, 4)).astype("{plan.dtype}")',
        f'y = (x[:, :1] + x[:, 1:2] > 0).astype("{plan.dtype}")',
    ]


def _words(plan, rng):
    return [*_padded(), f'y = numbers.integers({CLASSES}, size=rows).astype("int32")']


def _padded():
    return [
        f'x = numbers.integers(1, {WORDS}, size=(rows, {TOKENS})).astype("int32")',
        f"lengths = numbers.integers(1, {TOKENS + 1}, size=rows)",
        f"x[np.arange({TOKENS}) >= lengths[:, None]] = 0",
    ]


def _tokens(plan, rng):
    return [*_padded(), f"y = np.where(x > 0, (x * 3 + np.roll(x, 1, axis=1)) % {WORDS}, 0)"]


def _inputs(plan, rng):
    shape = rng.choice(('{"left": left, "right": right}', "[left, right]", "(left, right)"))
    return [
        f'left = numbers.normal(size=(rows, 3)).astype("{plan.dtype}")',
        f'right = numbers.normal(size=(rows, 5)).astype("{plan.dtype}")',
        f"x = {shape}",
        "y = left.sum(axis=1, keepdims=True) * right[:, :1]",
    ]


def _outputs(plan, rng):
    return [
        f'x = numbers.normal(size=(rows, 4)).astype("{plan.dtype}")',
        "value = np.cos(x).sum(axis=1, keepdims=True)",
        f'kind = numbers.integers({CLASSES}, size=rows).astype("int32")',
        "y = " + ('{"value": value, "kind": kind}' if _by_name(plan) else "[value, kind]"),
    ]


def _by_name(plan):
    return plan.seed % 2 == 0


def _strings(plan, rng):
    return [
        'x = tf.constant(numbers.choice(["red", "green", "blue", "grey"], size=(rows, 1)))',
        f'y = numbers.integers({CLASSES}, size=rows).astype("int32")',
    ]


def _ragged(plan, rng):
    return [
        f"lengths = numbers.integers(1, {TOKENS + 1}, size=rows)",
        f'flat = numbers.integers(1, {WORDS}, size=lengths.sum()).astype("int32")',
        "x = tf.RaggedTensor.from_row_lengths(flat, lengths)",
        f'y = numbers.integers({CLASSES}, size=rows).astype("int32")',
    ]


DATA = {
    "values": _values, "images": _images, "classes": _classes, "binary": _binary, "words": _words,
    "tokens": _tokens, "inputs": _inputs, "outputs": _outputs, "strings": _strings, "ragged": _ragged,
}  # fmt: skip


def model(plan, rng, logits):
    """Lines that make ``model``; what the last layer gives is ``logits``, or probabilities."""
    if plan.task in BUILT:
        return BUILT[plan.task](plan, rng, logits)
    layers = [*_with_extra(plan, HIDDEN[plan.task](rng)), _head(plan, logits)]
    if plan.style == "subclass":
        return [
            f"body = keras.Sequential([{', '.join(layers)}])",
            "model = Model(body)",
        ]
    lines = [f"inputs = keras.Input({SHAPES[plan.task]})", "h = inputs"]
    lines += [f"h = {layer}(h)" for layer in layers]
    return [*lines, "model = Model(inputs, h)"]


SHAPES = {
    "values": "(4,)", "classes": "(4,)", "binary": "(4,)", "images": "(6, 6, 2)",
    "words": f'({TOKENS},), dtype="int32"', "tokens": f'({TOKENS},), dtype="int32"',
}  # fmt: skip


def _dense(rng):
    activation = rng.choice(("tanh", "gelu", "silu", "softplus"))
    return [
        f'layers.Dense(8, activation="{activation}")',
        *(["layers.LayerNormalization()"] * rng.randint(0, 1)),
    ]


def _conv(rng):
    pool = rng.choice(("layers.GlobalAveragePooling2D()", "layers.Flatten()"))
    return [
        'layers.Conv2D(4, 3, activation="tanh")',
        rng.choice(("layers.AveragePooling2D(2)", pool)),
        "layers.Flatten()",
    ]


def _embedded(rng):
    mask = rng.choice(("mask_zero=True", "mask_zero=True", "mask_zero=False"))
    kind = rng.choice(
        (
            "layers.LSTM(6)",
            "layers.GRU(6)",
            "layers.GlobalAveragePooling1D()",
            "layers.Bidirectional(layers.GRU(4))",
        )
    )
    return [f"layers.Embedding({WORDS}, 6, {mask})", kind]


def _sequence(rng):
    mask = rng.choice(("mask_zero=True", "mask_zero=True", "mask_zero=False"))
    kind = rng.choice(
        (
            "layers.LSTM(6, return_sequences=True)",
            "layers.GRU(6, return_sequences=True)",
            'layers.Dense(8, activation="tanh")',
        )
    )
    return [f"layers.Embedding({WORDS}, 6, {mask})", kind]


HIDDEN = {
    "values": _dense, "classes": _dense, "binary": _dense, "images": _conv, "words": _embedded, "tokens": _sequence,
}  # fmt: skip
EXTRA_LAYERS = {
    "penalty": 'layers.Dense(6, kernel_regularizer=keras.regularizers.L2(0.01), activation="tanh")',
    "activity": "layers.Dense(6, activity_regularizer=keras.regularizers.L2(0.01))",
    "add_loss": "Shrink()",
    "batch norm": "layers.BatchNormalization(momentum=0.8)",
    "frozen": "layers.Dense(6, trainable=False)",
    "dropout": "layers.Dropout(0.3)",
    "noise": "layers.GaussianNoise(0.1)",
}


def _with_extra(plan, layers):
    extra = EXTRA_LAYERS.get(plan.extra)
    if extra is None:
        return layers
    at = len(layers) if plan.task in ("words", "tokens", "images") else 1
    return [*layers[:at], extra, *layers[at:]]


def _head(plan, logits):
    units, activation = {
        "values": (1, None), "binary": (1, "sigmoid"), "tokens": (WORDS, "softmax"),
    }.get(plan.task, (CLASSES, "softmax"))  # fmt: skip
    return (
        f"layers.Dense({units})"
        if logits or activation is None
        else f'layers.Dense({units}, activation="{activation}")'
    )


def _two_inputs(plan, rng, logits):
    return [
        'left_in, right_in = keras.Input((3,), name="left"), keras.Input((5,), name="right")',
        'h = layers.Dense(4, activation="tanh")(left_in) * layers.Dense(4)(right_in)',
        *([f"h = {EXTRA_LAYERS[plan.extra]}(h)"] if plan.extra else []),
        "inputs = "
        + ('{"left": left_in, "right": right_in}' if rng.random() < 0.3 else "[left_in, right_in]"),
        "model = Model(inputs, layers.Dense(1)(h))",
    ]


def _two_outputs(plan, rng, logits):
    kind = f"layers.Dense({CLASSES}{'' if logits else ', activation=' + repr('softmax')}, name='kind')(h)".replace(
        "'", '"'
    )
    outputs = '{"value": value, "kind": kind}' if _by_name(plan) else "[value, kind]"
    return [
        "inputs = keras.Input((4,))",
        'h = layers.Dense(8, activation="tanh")(inputs)',
        *([f"h = {EXTRA_LAYERS[plan.extra]}(h)"] if plan.extra else []),
        f'value, kind = layers.Dense(1, name="value")(h), {kind}',
        f"model = Model(inputs, {outputs})",
    ]


def _looked_up(plan, rng, logits):
    return [
        'inputs = keras.Input((1,), dtype="string")',
        'h = layers.StringLookup(vocabulary=["red", "green", "blue"])(inputs)',
        "h = layers.Flatten()(layers.Embedding(5, 4)(h))",
        *([f"h = {EXTRA_LAYERS[plan.extra]}(h)"] if plan.extra else []),
        f"model = Model(inputs, {_head(plan, logits)}(h))",
    ]


def _of_ragged(plan, rng, logits):
    return [f"model = Bag({_head(plan, logits)})"]


BUILT = {"inputs": _two_inputs, "outputs": _two_outputs, "strings": _looked_up, "ragged": _of_ragged}
