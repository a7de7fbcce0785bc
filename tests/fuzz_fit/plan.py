"""The choices of a random user script: a pure function of a seed. `script` writes them down."""

import random
from dataclasses import dataclass

TASKS = {
    "values": 3, "images": 2, "classes": 3, "binary": 2, "words": 2, "tokens": 4, "inputs": 2, "outputs": 3,
    "strings": 1, "ragged": 1,
}  # fmt: skip
FORMS = {
    "arrays": 4, "shard arrays": 4, "dataset": 2, "shard dataset": 2, "repeat": 1, "shard repeat": 1,
    "pydataset": 1, "shard pydataset": 1, "generator": 1, "frame": 1, "tensors": 1, "shard rows": 1,
}  # fmt: skip
STEPS = {"": 10, "guide": 2, "own loss": 2, "unpack": 1, "compute_loss": 2}
EXTRAS = {
    "": 8,
    "penalty": 2,
    "activity": 2,
    "add_loss": 2,
    "batch norm": 3,
    "frozen": 1,
    "dropout": 1,
    "noise": 1,
}
COMPILE = {
    "": 12, "run_eagerly=True": 1, "steps_per_execution=2": 2, "steps_per_execution=3": 1,
    "jit_compile=False": 2, "jit_compile=True": 1,
}  # fmt: skip
OPTIMIZERS = {
    "SGD(0.05)": 4, "SGD(0.05, momentum=0.9)": 2, "SGD(0.05, momentum=0.9, nesterov=True)": 1,
    "Adam(0.01, epsilon=1e-3)": 4, "AdamW(0.01, epsilon=1e-3, weight_decay=0.01)": 2,
    "RMSprop(0.003, epsilon=1e-3)": 1, "Adam(0.01, epsilon=1e-3, amsgrad=True)": 1, "Lion(0.001)": 0,
    "Adagrad(0.05, epsilon=1e-3)": 1, "Nadam(0.01, epsilon=1e-3)": 1,
}  # fmt: skip
MORE = {
    "": 10, "clipnorm=0.1": 1, "global_clipnorm=0.2": 2, "clipvalue=0.05": 1, "use_ema=True": 1,
    "gradient_accumulation_steps=2": 2, "use_ema=True, ema_overwrite_frequency=2": 1,
}  # fmt: skip
CALLBACKS = (
    "EarlyStopping", "ReduceLROnPlateau", "LearningRateScheduler", "ModelCheckpoint", "LambdaCallback",
    "CSVLogger", "TerminateOnNaN", "own",
)  # fmt: skip
VALIDATION = {"": 4, "arrays": 3, "split": 1, "dataset": 1, "shard": 2, "steps": 1, "rare": 1}


@dataclass(frozen=True)
class Plan:
    """One script. Names of choices are keys of the tables above.

    ``rows`` examples in batches of ``batch``; ``last`` batches may be smaller. ``dtype`` is Keras's floatx.
    """

    seed: int
    task: str
    form: str
    step: str
    extra: str
    compile: str
    optimizer: str
    more: str
    weights: str
    callbacks: tuple[str, ...]
    validation: str
    batch: int
    rows: int
    epochs: int
    dtype: str
    style: str
    again: bool
    weighted_metrics: bool


def plan_of(seed):
    """The plan of a seed; draws that do not go together are mended, always in the same way."""
    rng = random.Random(seed)
    drawn = {
        "task": _one_of(rng, TASKS),
        "form": _one_of(rng, FORMS),
        "step": _one_of(rng, STEPS),
        "extra": _one_of(rng, EXTRAS),
        "compile": _one_of(rng, COMPILE),
        "optimizer": _one_of(rng, OPTIMIZERS),
        "more": _one_of(rng, MORE),
        "weights": _one_of(rng, {"": 5, "rows": 3, "zeros": 1, "class": 2, "own axes": 2}),
        "callbacks": tuple(sorted(rng.sample(CALLBACKS, rng.choice((0, 0, 0, 1, 1, 2, 3))))),
        "validation": _one_of(rng, VALIDATION),
        "batch": rng.choice((4, 6, 7, 8, 12)),
        "epochs": rng.choice((1, 2, 2)),
        "dtype": _one_of(rng, {"float32": 4, "float64": 1}),
        "style": _one_of(rng, {"functional": 3, "subclass": 1}),
        "again": rng.random() < 0.1,
        "weighted_metrics": rng.random() < 0.2,
    }
    batches, rest = rng.choice((2, 3, 4)), rng.choice((0, 0, 1, 2, 3))
    drawn["rows"] = drawn["batch"] * batches + min(rest, drawn["batch"] - 1)
    return Plan(seed, **_mended(drawn))


def _one_of(rng, weighted):
    return rng.choices(list(weighted), list(weighted.values()))[0]


def _mended(drawn):
    """Draws that Keras does not take together, or that no text is written for, changed to ones that are."""
    task, form = drawn["task"], drawn["form"]
    plain_rows = task in ("values", "classes", "binary")
    if (form == "frame" and not plain_rows) or (form == "tensors" and task == "strings"):
        form = "arrays"
    if task == "ragged" and form not in ("arrays", "shard arrays", "dataset", "shard dataset"):
        form = "dataset"
    if task in ("inputs", "outputs", "strings", "ragged", "tokens") or drawn["step"] == "compute_loss":
        drawn["style"] = "functional"
    if drawn["step"] not in ("", "compute_loss") and task in ("inputs", "outputs", "strings", "ragged"):
        drawn["step"] = ""
    if drawn["step"] in ("guide", "own loss"):  # `x, y = data` has no room for weights
        drawn["weights"] = ""
    if drawn["weights"] == "class" and task not in ("classes", "words", "images", "binary"):
        drawn["weights"] = "rows"
    if drawn["weights"] == "own axes" and task not in ("tokens", "outputs"):
        drawn["weights"] = "rows"
    if task in ("outputs", "tokens") and drawn["weights"] in ("rows", "zeros"):
        drawn["weights"] = (
            "own axes"  # Keras takes one array of weights for several outputs in some forms only
        )
    if form in ("repeat", "shard repeat", "generator"):
        drawn["rows"] = drawn["batch"] * max(2, drawn["rows"] // drawn["batch"])
    if drawn["validation"] == "split" and form not in ("arrays", "tensors", "frame"):
        drawn["validation"] = "arrays"
    if drawn["validation"] == "split" and (task in ("strings", "ragged") or drawn["weights"]):
        drawn["validation"] = "arrays"
    if drawn["extra"] in ("dropout", "noise") or task == "ragged":
        drawn["compile"] = ""
    if drawn["compile"] == "jit_compile=True" and task in ("strings", "ragged", "words", "tokens"):
        drawn["compile"] = "jit_compile=False"
    if task in ("strings", "ragged"):
        drawn["dtype"] = "float32"
    return drawn | {"form": form}
