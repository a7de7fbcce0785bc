"""Facts that determine the numbers of a training, as plain values by name, for comparison between ranks.

Everything is compared by value: configurations of layers and of the optimizer, weights by path and shape,
options. What may differ is left out: initial values and their seeds (rank 0's are broadcast), seeds of
dropout (the Trainer sets its own). Keras numbers layers per process, so ``dense_3`` of one rank may be
``dense`` of another: of such numbers only the order is compared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from tf_dist.optim.layer_lr import lr_scale_of
from tf_dist.parallel.sharding import part_of

Facts = dict[str, Any]
# Steps at which learning rates are compared, besides the configuration of a schedule.
RATES_AT = (0, 1, 10, 100, 1_000, 10_000, 100_000)
LONGEST_TEXT = 120
NUMBERED = re.compile(r"(.+)_(\d{1,9})", re.DOTALL)
# Arrays up to this size are hashed whole, of larger ones this many blocks.
HASHED_BYTES, BLOCKS = 64 << 20, 1024


def of_weights(model: keras.Model) -> Facts:
    """The weights of a built model: paths, unsharded shapes, dtypes, learning-rate factors; in order."""
    renamed = _Names(model)
    return {
        f"weight {number}": f"{renamed.path(v.path)} {tuple(part_of(v).whole)} {v.dtype}"
        f"{'' if v.trainable else ' (not trained)'}{_rate(v)}"
        for number, v in enumerate(model.weights)
    }


def _rate(variable: Any) -> str:
    scale = lr_scale_of(variable)
    return "" if scale == 1 else f", learning rate x {scale!r}"


def of_layers(model: keras.Model) -> Facts:
    """The configurations of a model's layers, and how they are connected."""
    renamed, found = _Names(model), Facts()
    for number, layer in enumerate(_layers(model)):
        where = f"layer {number} ({renamed.of(layer.name)})"
        found[where] = type(layer).__name__
        found[f"{where} dtype_policy"] = layer.dtype_policy.name
        values = _connections(layer, renamed) if isinstance(layer, keras.Model) else _configuration(layer)
        for key, value in _flat(values):
            found[f"{where} {key}"] = value
    found["floatx"] = keras.config.floatx()
    return found


def of_optimizer(optimizer: Any) -> Facts:
    """The class, hyper-parameters and learning rates of an optimizer."""
    found: Facts = {"optimizer": type(optimizer).__name__}
    found |= dict(_flat(_configuration(optimizer)))
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    schedule = getattr(inner, "_learning_rate", None)
    if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        found |= {f"learning rate at step {at}": float(schedule(at)) for at in RATES_AT}
    return found


def of_options(options: Mapping[str, Any]) -> Facts:
    """Options, by name."""
    return dict(_flat(options))


def of_array(array: np.ndarray) -> str:
    """Length, dtype and hash of an array; of a large one, the hash of blocks spread over it."""
    flat = array.reshape(-1)
    block = max(1, HASHED_BYTES // BLOCKS // max(1, flat.itemsize))
    digest = hashlib.sha256()
    if flat.nbytes <= HASHED_BYTES:
        digest.update(np.ascontiguousarray(flat).view(np.uint8).data)
    else:
        for start in np.linspace(0, flat.size - block, BLOCKS, dtype=np.int64):
            digest.update(np.ascontiguousarray(flat[start : start + block]).view(np.uint8).data)
    return f"{flat.size:,} {flat.dtype} with SHA-256 {digest.hexdigest()[:16]}"


class _Names:
    """Names of a model's layers and variables; of those that end in a number, only the order counts.

    If ranks have another order, as that of a Python set, the names differ as well.
    """

    def __init__(self, model: keras.Model) -> None:
        words = {one.name for one in _named(model)}
        words |= {word for v in model.variables for word in v.path.split("/")}
        numbers: dict[str, list[int]] = {}
        for base, number in sorted(map(_numbered, words)):
            numbers.setdefault(base, []).append(number)
        self._numbers = numbers

    def of(self, name: str) -> str:
        """A name, with its rank among those that differ from it only in the number."""
        base, number = _numbered(name)
        known = self._numbers.get(base, [])
        return f"{base} #{known.index(number)}" if number in known and len(known) > 1 else base

    def path(self, path: str) -> str:
        """A path of a variable."""
        return "/".join(self.of(word) for word in path.split("/"))


def _numbered(name: str) -> tuple[str, int]:
    found = NUMBERED.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, 0)


def _layers(model: keras.Model) -> list[Any]:
    return list(model._flatten_layers())


def _named(model: keras.Model) -> Iterator[Any]:
    """Layers, and operations of functional models that are no layers."""
    for layer in _layers(model):
        yield layer
        yield from getattr(layer, "operations", ())


def _configuration(one: Any) -> Mapping[str, Any]:
    """The configuration of a layer or an optimizer, or else its plain attributes."""
    try:
        found = dict(one.get_config())
    except Exception:  # a user's class may raise anything
        return _attributes(one)
    if isinstance(one, keras.layers.Lambda):  # Keras has its bytes, with the names of files in them
        found["function"] = one.function
    for key in ("layers", "seed"):
        found.pop(key, None)
    if type(one).__module__.startswith("tf_dist."):
        found.pop("rank", None)  # which part of a row this rank has (`tf_dist.layers.context_parallel`)
    return found


def _attributes(one: Any) -> dict[str, Any]:
    """Public numbers and strings of an object of a user's class."""
    base = keras.Model if isinstance(one, keras.Model) else keras.layers.Layer
    known = _known(base)
    plain = {key: value for key, value in vars(one).items() if key not in known and not key.startswith("_")}
    return {key: value for key, value in plain.items() if isinstance(value, bool | int | float | str)}


def _known(base: type) -> set[str]:
    """Attributes that Keras gives to every layer or model."""
    return set(vars(base())) | {"optimizer", "built", "name", "trainable"}


def _connections(model: keras.Model, renamed: _Names) -> Mapping[str, Any]:
    """The inputs of each operation of a functional model; the attributes of other models."""
    if not hasattr(model, "operations"):
        return _attributes(model)
    found: dict[str, Any] = {}
    for operation in model.operations:
        where = renamed.of(operation.name)
        if not isinstance(operation, keras.layers.Layer):
            found[f"operation {where}"] = [type(operation).__name__, dict(_configuration(operation))]
        for number, node in enumerate(operation._inbound_nodes):
            came = [one._keras_history for one in node.input_tensors]
            found[f"input of {where}, call {number}"] = [
                f"{renamed.of(history.operation.name)} {history.tensor_index}" for history in came
            ]
    return found


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested dictionaries and lists to pairs of a key and a plain value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not _of_no_matter(str(key)):
                yield from _flat(inner, f"{at}.{key}" if at else str(key))
    elif isinstance(value, list | tuple) and not all(_is_plain(one) for one in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{at}[{number}]")
    else:
        yield at, _plain(value)


def _of_no_matter(key: str) -> bool:
    return key.endswith("initializer") or key in ("name", "build_config", "module", "registered_name")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return value[:LONGEST_TEXT]
    if isinstance(value, list | tuple):
        return str([_plain(one) for one in value])[:LONGEST_TEXT]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float | np.floating):
        return repr(float(value))  # also infinities, which JSON lacks
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.ndarray) or hasattr(value, "numpy"):
        return of_array(np.asarray(value.numpy() if hasattr(value, "numpy") else value))
    if isinstance(value, set | frozenset):
        return str(sorted(map(str, value)))[:LONGEST_TEXT]
    code = getattr(value, "__code__", None)
    if code is not None:
        return _function(value, code)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _function(function: Any, code: Any) -> str:
    """A function by value: its code, and the plain values of its closure and defaults."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    outside = [one for one in (*cells, *(function.__defaults__ or ())) if _is_plain(one)]
    digest = hashlib.sha256(repr(list(_code(code))).encode()).hexdigest()[:12]
    return f"{function.__qualname__} {digest} {[_plain(one) for one in outside]}"


def _code(code: Any) -> Iterable[Any]:
    yield code.co_code
    yield code.co_names
    for constant in code.co_consts:
        if _is_plain(constant):
            yield constant
        elif hasattr(constant, "co_code"):
            yield from _code(constant)
