"""Class weights: a weighted loss of training, the plain one of validation; in the last segment too."""

import keras
import numpy as np

from tf_dist.models.model_outputs import class_weights_of, same_outputs, with_class_weights
from tf_dist.runners.replica import Replica

X = np.arange(8, dtype=np.int32).reshape(4, 2) % 5
Y = np.array([[0], [1], [1], [2]], np.int32)


def model_of(weights=()):
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Embedding(5, 4), keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(3)]
    model = keras.Sequential([keras.Input((2,), dtype="int32"), *layers, keras.layers.Reshape((1, 3))])
    return with_class_weights(model, weights)


def losses(model):
    logits = np.asarray(model(X))[:, 0]
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(4), Y[:, 0]]


def test_training_weighs_and_validation_does_not():
    weights = [2.0, 0.5, 1.0]
    model = model_of(weights)
    replica = Replica(model, keras.optimizers.SGD(0.1), 4, 2, seed=1)
    own = losses(model)
    weighted = own * np.take(weights, Y[:, 0])
    np.testing.assert_allclose(replica.gradients(X, Y, (0, 0))[1][:2], [weighted.sum(), 4], rtol=1e-5)
    np.testing.assert_allclose(replica.evaluate(X, Y)[:2], [own.sum(), 4], rtol=1e-5)


def test_no_row_of_padding_weighs_anything():
    model = model_of([2.0, 0.5, 1.0])
    replica = Replica(model, keras.optimizers.SGD(0.1), 4, 2, seed=1)
    gradient, sums = replica.gradients(X, np.full_like(Y, -1), (0, 0))
    assert sums.tolist() == [0, 0, 0] and not gradient.any()


def test_a_last_segment_has_the_weights_of_the_whole_model():
    assert class_weights_of(same_outputs(model_of(), model_of([1.0, 2.0, 3.0]))) == (1.0, 2.0, 3.0)
