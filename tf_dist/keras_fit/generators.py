"""Python generators are read no further than is trained on, or evaluated.

TensorFlow reads ahead as far as it has time to. What it had read beyond the last step would be lost to the
next `fit` with the same generator, or to the next validation, and be other batches on each rank.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter


def read_no_further(iterator: Any, epochs: int) -> None:
    """Limit what is read of the generator, if there is one.

    Args:
        iterator: Keras's, of a `fit`, an evaluation or a prediction; each reset reads anew.
        epochs: that are walked through without a reset.
    """
    adapter, steps = iterator.data_adapter, iterator.steps_per_epoch
    if steps is None or not isinstance(adapter, GeneratorDataAdapter):
        return
    at_once = int(np.asarray(iterator.steps_per_execution))
    batches, generator = -(-steps // at_once) * at_once * epochs, adapter.generator
    adapter.generator = lambda: islice(generator(), batches)
