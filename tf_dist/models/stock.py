"""Convert a model to stock Keras layers, so that its file opens where only Keras is installed.

The layers of `tf_dist.models` compute the same as layers of Keras, faster. Each has a counterpart there with
the same weights, perhaps in another shape. `stock_model` replaces them; `give` and `take` copy weights there
and back, bit for bit.

Legend: B rows, T tokens, D width, H heads, K = D / H width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers, ops
from keras.src.models import Functional

from tf_dist.models import fast_layers, fast_lstm, transformer
from tf_dist.models.body_sizes import GPT2
from tf_dist.models.self_attention import CausalSelfAttention

Arrays = list[np.ndarray]


def _as_it_is(layer: layers.Layer, arrays: Arrays) -> Arrays:
    return arrays


def _call(layer: layers.Layer, *args: Any, **kwargs: Any) -> Any:
    return layer(*args, **kwargs)


class Counterpart(NamedTuple):
    """The stock replacement of one of our layers.

    make: our layer -> the stock layer, without weights yet.
    call: the stock layer and the arguments of our layer's call -> the result of our layer.
    to_stock, from_stock: our layer, and the weights of one -> those of the other.
    """

    make: Callable[[Any], layers.Layer]
    call: Callable[..., Any] = _call
    to_stock: Callable[[Any, Arrays], Arrays] = _as_it_is
    from_stock: Callable[[Any, Arrays], Arrays] = _as_it_is


def _attention(layer: CausalSelfAttention) -> layers.Layer:
    width = layer.output_projection.units
    return layers.MultiHeadAttention(
        layer.heads,
        width // layer.heads,
        dropout=layer.dropout,
        kernel_initializer=transformer.normal(0.02),
        name=layer.name,
        dtype=layer.dtype_policy,
        trainable=layer.trainable,
    )


def _attend(layer: layers.Layer, x_BxTxD: Any, bias: Any = None, **kwargs: Any) -> Any:
    if bias is None:
        return layer(x_BxTxD, x_BxTxD, use_causal_mask=True, **kwargs)
    seen_BxTxT = ops.equal(bias[:, 0], 0)
    return layer(x_BxTxD, x_BxTxD, attention_mask=seen_BxTxT, **kwargs)


def _divided(layer: CausalSelfAttention, arrays: Arrays) -> Arrays:
    """(D, 3 D), (3 D,), (D, D), (D,) -> a kernel (D, H, K) and a bias (H, K) thrice, (H, K, D), (D,)."""
    kernel_Dx3D, bias_3D, output_DxD, output_D = arrays
    D, H = output_D.size, layer.heads
    K = D // H
    kernels, biases = kernel_Dx3D.reshape(D, 3, H, K), bias_3D.reshape(3, H, K)
    parts = [part for i in range(3) for part in (kernels[:, i], biases[i])]
    return [*parts, output_DxD.reshape(H, K, D), output_D]


def _joined(layer: CausalSelfAttention, arrays: Arrays) -> Arrays:
    *parts, output_HxKxD, output_D = arrays
    D = output_D.size
    kernel_Dx3D = np.stack(parts[0::2], axis=1).reshape(D, 3 * D)
    return [kernel_Dx3D, np.stack(parts[1::2]).reshape(3 * D), output_HxKxD.reshape(D, D), output_D]


def _positions(layer: transformer.LearnedPositions) -> layers.Layer:
    T, D = layer.table_TxD.shape
    return layers.Embedding(T, D, name=layer.name, dtype=layer.dtype_policy, trainable=layer.trainable)


def _add_positions(layer: layers.Layer, x_BxTxD: Any, places_BxT: Any = None, **kwargs: Any) -> Any:
    """Keras has no layer for a token's position: it is the number of tokens up to it, less 1."""
    if places_BxT is None:
        places_BxT = ops.cumsum(ops.ones_like(x_BxTxD[:, :, 0], dtype="int32"), axis=1) - 1
    added = layers.Add(name=f"{layer.name}_added", dtype=layer.dtype_policy)
    return added([x_BxTxD, layer(places_BxT)])


def _parent(cls: type[layers.Layer]) -> Callable[[Any], layers.Layer]:
    """The Keras class that ours inherits from, with the same configuration."""
    return lambda layer: cls.from_config(layer.get_config())


COUNTERPARTS: dict[type[layers.Layer], Counterpart] = {
    fast_lstm.LSTM: Counterpart(_parent(layers.LSTM)),
    fast_layers.LayerNormalization: Counterpart(_parent(layers.LayerNormalization)),
    transformer.LearnedPositions: Counterpart(_positions, _add_positions),
    CausalSelfAttention: Counterpart(_attention, _attend, _divided, _joined),
    fast_layers.RMSNormalization: Counterpart(_parent(layers.RMSNormalization)),
}


def _counterpart(layer: Any) -> Counterpart | None:
    """Keras's attention has no rotated heads, norms of heads, or window: such a layer stays ours."""
    if getattr(layer, "kind", GPT2) != GPT2:
        return None
    return COUNTERPARTS.get(type(layer))


def stock_model(model: keras.Model) -> keras.Model | None:
    """Convert a model to stock layers, with its weights copied; None if Keras has no graph of it.

    Other layers are unchanged: `not_stock` lists their classes.

    Args:
        model: any model; those that are neither functional nor sequential have no graph.

    Raises:
        Exception: from ``get_config`` and ``from_config`` of a user's layer.
    """
    if not _has_graph(model):
        return None
    made: dict[str, Counterpart] = {}

    def clone(layer: Any) -> Any:
        if _has_graph(layer):
            return stock_model(layer)
        counterpart = _counterpart(layer)
        if counterpart is not None:
            made[layer.name] = counterpart
            return counterpart.make(layer)
        if not isinstance(layer, layers.Layer):
            return layer  # an operation of `keras.ops` has no weights: shareable between graphs
        config = layer.get_config()
        if getattr(layer, "activation", None) is fast_layers.gelu:
            config["activation"] = "gelu"
        return type(layer).from_config(config)

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        counterpart = made.get(layer.name)
        return counterpart.call(layer, *args, **kwargs) if counterpart else layer(*args, **kwargs)

    graph = model
    if isinstance(model, keras.Sequential):
        graph = keras.Model(model.inputs, model.outputs, name=model.name)
    copy = keras.models.clone_model(graph, clone_function=clone, call_function=call)
    give(model, copy)
    return copy


def _has_graph(model: Any) -> bool:
    return isinstance(model, keras.Sequential | Functional)


def give(ours: keras.Model, stock: keras.Model) -> None:
    """Copy the weights of a model to its stock counterpart."""
    for mine, theirs, counterpart in _pairs(ours, stock):
        theirs.set_weights(counterpart.to_stock(mine, mine.get_weights()))


def take(ours: keras.Model, stock: keras.Model) -> None:
    """Copy weights back from the stock counterpart to the model."""
    for mine, theirs, counterpart in _pairs(ours, stock):
        mine.set_weights(counterpart.from_stock(mine, theirs.get_weights()))


def _pairs(ours: keras.Model, stock: keras.Model) -> Iterator[tuple[Any, Any, Counterpart]]:
    same = Counterpart(lambda layer: layer)
    for mine in ours.layers:
        if _has_graph(mine):
            yield from _pairs(mine, stock.get_layer(mine.name))
        elif mine.weights:
            yield mine, stock.get_layer(mine.name), _counterpart(mine) or same


def not_stock(model: keras.Model) -> list[type[layers.Layer]]:
    """Classes in a model that are not Keras's, sorted by name: needed to open its file."""
    found = {type(layer) for layer in model._flatten_layers()}
    return sorted((c for c in found if not c.__module__.startswith("keras.")), key=lambda c: c.__qualname__)


def difference(one: keras.Model, other: keras.Model) -> float:
    """The largest difference of two models' outputs, relative to the largest output (at least 1).

    Both map token ids (B, T) to logits (B, T, V).
    """
    shape = (2, int(one.input_shape[1]))
    ids_BxT = np.random.default_rng(1).integers(0, int(one.output_shape[-1]), shape).astype(np.int32)
    a, b = (np.asarray(ops.cast(m(ids_BxT, training=False), "float32")) for m in (one, other))
    return float(np.abs(a - b).max() / max(1.0, np.abs(a).max()))
