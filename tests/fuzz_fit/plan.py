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
    for mend in (_form, _code, _weights, _numbers, _validation):
        drawn = drawn | mend(drawn, drawn["task"])
    return drawn


def _form(drawn, task):
    form = drawn["form"]
    if (form == "frame" and task not in ("values", "classes", "binary")) or (
        form == "tensors" and task == "strings"
    ):
        form = "arrays"
    if task == "ragged" and form not in ("arrays", "shard arrays", "dataset", "shard dataset"):
        form = "dataset"
    return {"form": form}


def _code(drawn, task):
    several = task in ("inputs", "outputs", "strings", "ragged")
    step = "" if drawn["step"] != "compute_loss" and several else drawn["step"]
    own = several or task == "tokens" or step == "compute_loss"
    return {"step": step, "style": "functional" if own else drawn["style"]}


def _weights(drawn, task):
    weights = drawn["weights"]
    if drawn["step"] in ("guide", "own loss"):  # `x, y = data` has no room for weights
        weights = ""
    if weights == "class" and task not in ("classes", "words", "images", "binary"):
        weights = "rows"
    if weights == "own axes" and task not in ("tokens", "outputs"):
        weights = "rows"
    if weights in ("rows", "zeros") and task in ("tokens", "outputs"):
        weights = "own axes"  # those of rows go with a loss of rows, and one output
    return {"weights": weights}


def _numbers(drawn, task):
    compiled, rows = drawn["compile"], drawn["rows"]
    if drawn["extra"] in ("dropout", "noise") or task == "ragged":
        compiled = ""
    if compiled == "jit_compile=True" and task in ("strings", "words", "tokens"):
        compiled = "jit_compile=False"
    if drawn["form"] in ("repeat", "shard repeat", "generator"):
        rows = drawn["batch"] * max(2, rows // drawn["batch"])
    dtype = "float32" if task in ("strings", "ragged") else drawn["dtype"]
    return {"compile": compiled, "rows": rows, "dtype": dtype}


def _validation(drawn, task):
    splits = drawn["form"] in ("arrays", "tensors", "frame") and task not in ("strings", "ragged")
    cannot = drawn["validation"] == "split" and (not splits or drawn["weights"])
    return {"validation": "arrays" if cannot else drawn["validation"]}
