"""What is random in a model, made a function of (seed, step, micro-batch) alone.

Keras's random layers draw from seed generators, variables that count up. They are set anew before every
micro-batch, so that what was drawn before, in which process, does not matter.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.random.seed_generator import global_seed_generator

# Operations whose draws are in nobody's variables, nor in their inputs: those behind `tf.random.*`.
FOREIGN = frozenset(
    {
        "Multinomial", "ParameterizedTruncatedNormal", "RandomGamma", "RandomPoisson", "RandomPoissonV2",
        "RandomShuffle", "RandomStandardNormal", "RandomUniform", "RandomUniformInt", "TruncatedNormal",
    }
)  # fmt: skip


def random_states(seed: int, draw: tuple[int, ...], count: int) -> np.ndarray:
    """States for ``count`` Keras seed generators, (count, 2) int64, from (seed, step, micro-batch) alone.

    `numpy.random.SeedSequence` mixes its words so that neighbouring steps share nothing, by an
    algorithm that NumPy promises not to change.
    """
    words = np.random.SeedSequence([seed, *draw]).generate_state(2 * count, np.uint32)
    # Keras counts up from the state and casts it to 32 bits: stay inside them.
    return (words.astype(np.int64) >> 1).reshape(count, 2)


def generator_states(model: keras.Model) -> list[Any]:
    """The variables that all of a model's random numbers depend on.

    Those of its layers, in order; and the global one, from which `keras.random` draws without a seed.
    """
    own = [variable for variable in model.variables if variable.path.endswith("seed_generator_state")]
    with tf.init_scope():  # it may have to be made, while a function is traced
        return [*own, global_seed_generator().state]


def foreign_draws(function: Any) -> list[str]:
    """The operations of a traced function that draw from no seed generator, by kind, sorted."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for inner in graph.library.function for node in inner.node_def)]
    return sorted({node.op for node in nodes} & FOREIGN)
