"""LoRA: low-rank adapters beside frozen kernels (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

A frozen kernel W of shape (E, D) gets two trainable factors A (E, r) and B (r, D); its layer computes
x W + s (x A) B with s = alpha / r. B begins with zeros, so that the model begins unchanged. After training
W + s A B is a plain kernel: `merged` adds it up, and no adapter is left.

The factors are weights of the layer that owns W, under its name with ``_lora_a`` and ``_lora_b``. Where ranks
divide W, they divide one factor in the same way: B with the columns, A with the rows.

Legend: E width of the input, D of the output, r rank of an adapter.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Container, Iterable
from typing import Any, NamedTuple

import keras
import numpy as np

from tf_dist.errors import UsageError
from tf_dist.models import fast_lstm
from tf_dist.models.patterns import chosen
from tf_dist.parallel.sharding import ShardSpec, part_of

A, B = "_lora_a", "_lora_b"


class _Kernel(NamedTuple):
    """A kernel that can have an adapter: its layer, the layer that owns it, and its attribute there."""

    layer: Any
    owner: Any
    name: str

    @property
    def variable(self) -> Any:
        return getattr(self.owner, self.name)


def add_adapters(model: keras.Model, rank: int, alpha: float, targets: str, seed: int) -> int:
    """Add an adapter to each frozen kernel that the targets choose; returns how many.

    Kernels of dense layers and of `tf_dist.models.fast_lstm.LSTM`, divided among ranks or not. Of a kernel
    that is trained itself nothing changes.

    Args:
        model: built, after `tf_dist.models.freezing.freeze`.
        rank: r.
        alpha: divided by r it is the scale of every adapter.
        targets: patterns of paths, see `tf_dist.models.patterns`.
        seed: of the initial values of A, which also depend on the path of the kernel.

    Raises:
        UsageError: nothing can get an adapter, or a layer cannot use one.
    """
    kernels = [one for one in _kernels(model) if not one.variable.trainable]
    if not kernels:
        raise UsageError(
            f"--lora-rank {rank}: model {model.name!r} has no frozen kernel to adapt. Adapters are for dense "
            "layers and LSTMs of tf_dist; those that --freeze does not name are trained themselves"
        )
    places = chosen([one.variable.path for one in kernels], targets, "--lora-targets")
    for place in places:
        _add(kernels[place], rank, alpha / rank, seed)
    return len(places)


def _kernels(model: keras.Model) -> list[_Kernel]:
    found = []
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Dense):
            found.append(_Kernel(layer, layer, "kernel"))
        elif isinstance(layer, fast_lstm.LSTM):
            found += [_Kernel(layer, layer.cell, name) for name in ("kernel", "recurrent_kernel")]
    return found


def _add(kernel: _Kernel, rank: int, scale: float, seed: int) -> None:
    variable, part = kernel.variable, part_of(kernel.variable)
    rows, columns = part.whole
    if rank > min(rows, columns):
        raise UsageError(
            f"--lora-rank {rank} is more than kernel {variable.path} of shape {rows} x {columns} has: use at "
            f"most {min(rows, columns)}, or leave it out of --lora-targets"
        )
    stddev = float(rows) ** -0.5
    own_seed = zlib.crc32(f"{seed}/{variable.path}".encode())
    normal = keras.initializers.RandomNormal(stddev=stddev, seed=own_seed)
    ranges = part.ranges
    a_part = ShardSpec((rows, rank), 0, ranges if part.axis == 0 else None)
    b_part = ShardSpec((rank, columns), 1, ranges if part.axis == 1 else None)
    a = _weight(kernel, A, a_part, normal)
    b = _weight(kernel, B, b_part, keras.initializers.Zeros())
    if kernel.owner is kernel.layer:
        _adapt_dense(kernel.layer, a, b, scale)
    else:
        kernel.layer.adapt(kernel.name, a, b, scale)


def _weight(kernel: _Kernel, suffix: str, part: ShardSpec, initializer: Callable[..., Any]) -> Any:
    """A new weight of a built layer, as Keras's own `Dense.enable_lora` makes one."""
    owner = kernel.owner

    def initial(shape: Any, dtype: Any = None) -> Any:
        whole = initializer(part.whole, dtype=dtype)
        # Not ShardSpec.take: Keras may be tracing a graph, where there are no arrays.
        return keras.ops.concatenate(part.slices_along(whole), axis=part.axis)

    owner._tracker.unlock()
    # Of the class: a layer that ranks divide has an `add_weight` that would divide this one as well.
    weight = type(owner).add_weight(
        owner, shape=part.shape, initializer=initial, name=f"{kernel.name}{suffix}", trainable=True
    )
    owner._tracker.lock()
    if part.ranges is not None:
        weight.tf_dist_part = part
    return weight


def _adapt_dense(layer: Any, a: Any, b: Any, scale: float) -> None:
    """Let a dense layer add its adapter to x W, before the activation."""
    call, activation, product = layer.call, layer.activation, getattr(layer, "low_rank_product", _product)
    layer.activation = keras.activations.linear

    def adapted(inputs: Any, training: bool | None = None) -> Any:
        return activation(call(inputs, training=training) + scale * product(inputs, a, b))

    layer.call = adapted


def _product(inputs: Any, a: Any, b: Any) -> Any:
    """The product (x A) B, in the dtype that the layer computes in."""
    return keras.ops.matmul(keras.ops.matmul(inputs, a), b)


# Merging --------------------------------------------------------------------------------------------


def has_adapters(paths: Iterable[str]) -> bool:
    """Whether some of these paths of weights are factors of adapters."""
    return any(path.endswith((A, B)) for path in paths)


def merged(path: str, read: Callable[[str], np.ndarray], paths: Container[str], scale: float) -> Any:
    """A weight as the model without adapters has it: W + s A B, added up in float64.

    Args:
        path: of the weight.
        read: a weight by its path.
        paths: of all weights.
        scale: s, alpha / r.
    """
    kernel = read(path)
    if path + A not in paths:
        return kernel
    product = np.matmul(read(path + A), read(path + B), dtype=np.float64)
    return (kernel + scale * product).astype(kernel.dtype)
