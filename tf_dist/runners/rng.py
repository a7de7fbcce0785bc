"""Random numbers of a model, as a function of (seed, step, micro-batch) only.

Keras's random layers draw from seed generators, variables that count up. They are set before every
micro-batch, so that earlier draws, in any process, do not matter.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.random.seed_generator import global_seed_generator

# Operations with hidden random state, neither in variables nor inputs: those of `tf.random.*`.
FOREIGN = frozenset(
    {
        "Multinomial", "ParameterizedTruncatedNormal", "RandomGamma", "RandomPoisson", "RandomPoissonV2",
        "RandomShuffle", "RandomStandardNormal", "RandomUniform", "RandomUniformInt", "TruncatedNormal",
    }
)  # fmt: skip


def random_states(seed: int, draw: tuple[int, ...], count: int) -> np.ndarray:
    """States for ``count`` Keras seed generators, (count, 2) int64, from (seed, step, micro-batch) only.

    `numpy.random.SeedSequence` mixes its words so that states of adjacent steps are unrelated, by an
    algorithm that NumPy promises not to change.
    """
    words = np.random.SeedSequence([seed, *draw]).generate_state(2 * count, np.uint32)
    # Keras counts up from the state and casts it to 32 bits: stay below that.
    return (words.astype(np.int64) >> 1).reshape(count, 2)


def generator_states(model: keras.Model) -> list[Any]:
    """The variables that determine all of a model's random numbers.

    Those of its layers, in order; and the global one, from which `keras.random` draws without a seed.
    """
    own = [variable for variable in model.variables if variable.path.endswith("seed_generator_state")]
    with tf.init_scope():  # it may have to be created, while a function is traced
        return [*own, global_seed_generator().state]


def foreign_draws(function: Any) -> list[str]:
    """The operations of a traced function that draw from no seed generator, by kind, sorted."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    return sorted({node.op for node in nodes} & FOREIGN)
