"""Weights that make every layer matter: those that a model begins with are small."""

import numpy as np


def strong(model):
    """The model, with noise added to its weights."""
    for number, variable in enumerate(model.trainable_variables):
        noise = np.random.default_rng(number).standard_normal(variable.shape).astype(np.float32)
        variable.assign(variable.numpy() + 0.3 * noise)
    return model
