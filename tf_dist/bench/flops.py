"""FLOPs of a training step, by formula, and the measured GEMM peak of the machine.

Only matrix products count, a multiplication and an addition for each pair of numbers; the backward pass has
two products for each one of the forward pass: for the gradients of the inputs and of the weights. With L
layers of width D, V tokens in the vocabulary and T in a sequence, the operations for each token are

    Transformer   6 (12 L D^2 + V D) + 12 L T D       as PaLM has it (Chowdhery et al. 2022, appendix B)
    LSTM          6 (8 L H^2 + V H)                   with H = D, the width of every layer and its input

12 L T D are the products of attention: scores and values, each 2 T D a token in the forward pass. What a
causal mask makes superfluous counts as well, by convention: who leaves it out comes out faster.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tf_dist.bench.models import VOCABULARY

# Of the matrices whose product is the peak: large enough for a core to reach it, small enough for its cache.
PEAK_SIZE, PEAK_PRODUCTS = 1024, 4


def per_token(sizes: dict[str, Any], vocabulary: int = VOCABULARY) -> float:
    """Operations for each token of a training step of a model of `tf_dist.bench.models`."""
    layers, width, seq_len = (int(sizes[key]) for key in ("layers", "width", "seq_len"))
    if sizes["model"] == "lstm":
        return 6.0 * (8 * layers * width**2 + vocabulary * width)
    return 6.0 * (12 * layers * width**2 + vocabulary * width) + 12.0 * layers * seq_len * width


def of_step(sizes: dict[str, Any], rows: int) -> float:
    """Operations of a step with some rows."""
    return per_token(sizes) * rows * int(sizes["seq_len"])


def peak_product() -> Callable[[], Any]:
    """A work that does nothing but PEAK_PRODUCTS products of float32 matrices, by TensorFlow."""
    import tensorflow as tf

    a = tf.random.stateless_normal((PEAK_SIZE, PEAK_SIZE), seed=(1, 2))

    @tf.function  # type: ignore[untyped-decorator]
    def products(matrix: Any) -> Any:
        for _ in range(PEAK_PRODUCTS):
            matrix = tf.matmul(a, matrix) / PEAK_SIZE
        return matrix

    return lambda: products(a)


def peak_per_s(work_ms: float) -> float:
    """Operations a second of a core, from the milliseconds of a `peak_product`."""
    return 2e3 * PEAK_PRODUCTS * PEAK_SIZE**3 / work_ms
