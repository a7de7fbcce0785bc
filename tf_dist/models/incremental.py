"""Incremental forward pass: a model computes new positions only, and keeps what later ones need in caches.

A layer takes part in one of two ways, which a class declares beside its ``call``:

- ``positionwise = True``: an output at a position depends on the inputs at that position alone, as in a dense
  layer. Such a layer is called as it is, on the new positions. Keras's own are listed here.
- ``begin`` and ``step``, for a layer that mixes positions or knows where it is:

      begin(batch, length) -> cache                     before the first position; see `Stepped`
      step(*inputs, cache=cache, span=span) -> (output, cache)

  ``inputs`` are those of ``call``, of the N new positions. A cache is a pytree of tensors of static shape,
  rows first: keys and values of up to ``length`` positions (`kv_cache.py`), an LSTM's state, or (). ``span``
  says which positions are new. Position t must come out as in ``call``, within rounding.

Both hold for the class that defines ``call`` and its subclasses, up to one that defines another ``call``:
that one has to declare its own.

For models whose rows have several streams (encoder and decoder): an input or output may be None, no new
positions of that stream; then a layer whose first input is None is not called, and its output is None.
``step`` may return a third value, the span of what it returns, if positions are counted from elsewhere.

Legend: B rows, N new positions of a call (padding included), T tokens of a row, L positions of a cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import keras
import tensorflow as tf
from keras.src.backend import AutocastScope

# Layers of Keras, and operations between its tensors, that are local to a position. Exact types: a subclass
# may compute anything.
POSITIONWISE = frozenset(
    {
        *("Activation", "ActivityRegularization", "Add", "AlphaDropout", "Average", "BatchNormalization"),
        *("Concatenate", "Dense", "RMSNormalization"),
        *(
            "Dropout",
            "ELU",
            "Embedding",
            "GaussianDropout",
            "GaussianNoise",
            "Identity",
            "LayerNormalization",
        ),
        *("LeakyReLU", "Maximum", "Minimum", "Multiply", "ReLU", "Rescaling", "ReversibleEmbedding"),
        *("Softmax", "Subtract"),
    }
)
RECURRENT = (keras.layers.GRU, keras.layers.LSTM, keras.layers.SimpleRNN)
ELEMENTWISE = frozenset(
    {"Add", "Cast", "Divide", "Gelu", "Multiply", "Relu", "Sigmoid", "Silu", "Subtract", "Tanh", "TrueDivide"}
)


class NotIncremental(Exception):
    """A model that cannot be run on new positions only; the message says which layer, and why."""


class Span(NamedTuple):
    """The new positions of a call, in each row: ``count_B`` of N, from ``start_B`` on; the rest is padding.

    (B,) int32 each. Padding is behind the new positions, and so at positions that come again later. A mask
    that lets a position look ahead must leave out those from ``start_B + count_B`` on.
    """

    start_B: Any
    count_B: Any

    def positions(self, new: int) -> Any:
        """The positions of all N, (B, N) int32."""
        return self.start_B[:, None] + tf.range(new)

    def last(self, x_BxNxD: Any) -> Any:
        """The last new position, (B, 1, ...), of a tensor of all N."""
        return tf.gather(x_BxNxD, tf.maximum(self.count_B - 1, 0)[:, None], axis=1, batch_dims=1)


class Stepped(Protocol):
    """A layer with ``begin`` and ``step``, as the walk over a model's layers calls it.

    Attributes:
        bounded: whether it knows ``length`` positions and no more; an LSTM goes on for ever.
    """

    bounded: bool

    def begin(self, batch: int, length: int) -> Any:
        """The cache of ``batch`` rows before their first position, for up to ``length`` positions."""

    def step(self, x: Any, *, cache: Any, span: Span) -> tuple[Any, ...]:
        """The output at new positions, and the cache with these in it."""


class RecurrentStep:
    """`Stepped`, of one of Keras's own recurrent layers: its state is kept.

    Args:
        layer: (B, T, D) -> (B, T, H).
    """

    bounded = False

    def __init__(self, layer: keras.layers.RNN) -> None:
        self._layer = layer

    def begin(self, batch: int, length: int) -> list[Any]:
        """As in `Stepped`."""
        return list(self._layer.get_initial_state(batch))

    def step(self, x: Any, *, cache: list[Any], span: Span) -> tuple[Any, list[Any]]:
        """As in `Stepped`."""
        present_BxN = tf.range(x.shape[1]) < span.count_B[:, None]
        x = tf.cast(x, self._layer.compute_dtype)
        _, outputs_BxNxH, state = self._layer.inner_loop(x, cache, present_BxN, training=False)
        return outputs_BxNxH, list(state)


class IncrementalModel:
    """A functional or sequential model, or a part of one, on new positions only.

    Args:
        model: one input, of token ids (B, T) or states (B, T, ...), and one output.

    Attributes:
        bounded: whether its caches hold ``length`` positions and no more.
        reads_ids: whether a layer keeps what it knows from token ids, for several others: each part of such a
            model would need the ids.

    Raises:
        NotIncremental: a layer does not say how it is computed for new positions only.
    """

    def __init__(self, model: keras.Model) -> None:
        function = getattr(model, "_functional", None) or model
        if not isinstance(function, keras.src.models.Functional):
            raise NotIncremental(f"{model.name!r} is a {type(model).__name__}, whose layers are unknown")
        if len(function.inputs) != 1 or len(function.outputs) != 1:
            raise NotIncremental(f"model {model.name!r} has several inputs or outputs")
        self._input, self._output = function.inputs[0], function.outputs[0]
        depths = sorted(function._nodes_by_depth, reverse=True)
        everything = [node for depth in depths for node in function._nodes_by_depth[depth]]
        self._nodes = [node for node in everything if not node.is_input]
        self._layers = [_stepped(node) for node in self._nodes]
        self.bounded = any(layer.bounded for layer in self._layers if layer is not None)
        self.reads_ids = any(getattr(layer, "reads_ids", False) for layer in self._layers)
        last = max((at for at, layer in enumerate(self._layers) if layer is not None), default=-1)
        self._last = last
        later = [tensor for node in self._nodes[last + 1 :] for tensor in node.input_tensors]
        self._wanted_later = {id(tensor) for tensor in [*later, self._output]}

    def refuse_parts(self) -> None:
        """Refuse to run consecutive parts of this model, each of which gets only the states before it.

        Raises:
            NotIncremental: all parts need the token ids.
        """
        if self.reads_ids:
            raise NotIncremental("every part of the model needs the token ids, for its masks")

    def begin(self, batch: int, length: int) -> list[Any]:
        """The caches of ``batch`` rows before their first position; see `Stepped`."""
        return [() if layer is None else layer.begin(batch, length) for layer in self._layers]

    def step(
        self, x_BxN: Any, *, cache: Sequence[Any], span: Span, last_only: bool = False
    ) -> tuple[Any, list[Any]]:
        """The output at new positions, (B, N, ...), and the caches with these in them.

        Args:
            x_BxN: token ids, or states (B, N, ...).
            cache: from `begin`, or the call before.
            span: which positions these are.
            last_only: the output at each row's last new position only, (B, 1, ...): what comes after the last
                layer that mixes positions is computed for no other.
        """
        values, spans = {id(self._input): x_BxN}, {id(self._input): span}
        caches = list(cache)
        if self._last < 0 and last_only:
            self._narrow(values, spans)
        for at, (node, layer) in enumerate(zip(self._nodes, self._layers, strict=True)):
            here = spans[id(node.input_tensors[0])]
            output, caches[at], here = _run(node, layer, values, caches[at], here)
            for tensor, value in zip(node.outputs, keras.tree.flatten(output), strict=True):
                values[id(tensor)], spans[id(tensor)] = value, here
            if at == self._last and last_only:
                self._narrow(values, spans)
        return values[id(self._output)], caches

    def _narrow(self, values: dict[int, Any], spans: dict[int, Span]) -> None:
        """Keep the last new position only, of the tensors that are still needed."""
        for name, value in values.items():
            if value is not None and name in self._wanted_later:
                values[name] = spans[name].last(value)


def _run(
    node: Any, layer: Stepped | None, values: dict[int, Any], cache: Any, span: Span
) -> tuple[Any, Any, Span]:
    """One call of a layer: its output, its cache, and the span of its output."""
    if values[id(node.input_tensors[0])] is None:
        return [None] * len(node.outputs), cache, span
    arguments, options = node.arguments.fill_in(values)
    if layer is None:
        return node.operation(*arguments, **options), cache, span
    if isinstance(layer, IncrementalModel):
        return *layer.step(arguments[0], cache=cache, span=span), span
    # Keras notes arguments of ``call`` that nobody gave; training is False here anyway.
    options = {name: value for name, value in options.items() if name != "training" and value is not None}
    with _computing(node.operation):
        output, cache, *moved = layer.step(*arguments, cache=cache, span=span, **options)
    return output, cache, moved[0] if moved else span


@contextlib.contextmanager
def _computing(layer: Any) -> Iterator[None]:
    """What `keras.layers.Layer` does around ``call``: weights are read in the layer's compute type."""
    with AutocastScope(layer.compute_dtype if layer.autocast else None):
        yield


def _stepped(node: Any) -> Any:
    """The layer of a node if it has caches, None if it is local to a position.

    Raises:
        NotIncremental: it is neither.
    """
    layer = node.operation
    kind = type(layer)
    if isinstance(layer, keras.Model):
        return IncrementalModel(layer)
    if _declares(kind, "step"):
        if getattr(layer, "steps", True):
            return layer
    elif kind in RECURRENT:
        if _keeps_its_state(node):
            return RecurrentStep(layer)
    elif kind.__module__.startswith("keras.src.ops"):
        if kind.__name__ in ELEMENTWISE and not _mixes(node):
            return None
    elif _declares(kind, "positionwise") or (
        kind.__module__.startswith("keras.src.layers") and kind.__name__ in POSITIONWISE
    ):
        if not _over_positions(layer, len(node.output_tensors[0].shape)):
            return None
    raise NotIncremental(
        f"layer {layer.name!r} ({kind.__name__}) does not say how to compute new positions only "
        "(tf_dist.models.incremental)"
    )


def _declares(kind: type, name: str) -> bool:
    """Whether a class says by ``name`` how the ``call`` is computed that it has."""

    def home(what: str) -> int:
        return next((at for at, one in enumerate(kind.__mro__) if what in vars(one)), len(kind.__mro__))

    return getattr(kind, name, None) not in (None, False) and home(name) <= min(map(home, CALLS))


# What a layer computes is in one of these.
CALLS = ("call", "inner_loop")


def _keeps_its_state(node: Any) -> bool:
    """Whether `RecurrentStep` knows the options of a recurrent layer, and what it is called with."""
    layer = node.operation
    others = ("go_backwards", "return_state", "stateful", "unroll", "zero_output_for_mask")
    plain = layer.return_sequences and not any(getattr(layer, name, False) for name in others)
    return plain and len(node.input_tensors) == 1


def _over_positions(layer: Any, rank: int) -> bool:
    """Whether the options of a layer that is usually local to a position make it something else."""
    if getattr(layer, "mask_zero", False):
        return True
    axis = getattr(layer, "axis", -1)
    axes = axis if isinstance(axis, list | tuple) else [axis]
    return any(one % rank < 2 for one in axes)


def _mixes(node: Any) -> bool:
    """Whether an operation between tensors may pair different positions."""
    ranks = {len(tensor.shape) for tensor in node.input_tensors}
    lengths = {tensor.shape[1] for tensor in node.input_tensors if len(tensor.shape) > 1}
    constants = [
        value
        for value in keras.tree.flatten([node.arguments.args, node.arguments.kwargs])
        if not isinstance(value, keras.KerasTensor) and len(getattr(value, "shape", ())) > 1
    ]
    return len(ranks) != 1 or len(lengths) != 1 or bool(constants)
