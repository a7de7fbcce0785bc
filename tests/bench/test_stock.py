"""What peers train is the model that we train: the same weights, the same logits."""

import numpy as np
import pytest

from tf_dist.bench import models, systems


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-lstm"])
def test_the_same_weights_give_the_same_logits(name):
    sizes, rows = models.RECIPES[name][:2]
    ours, _, batches = systems.stock_model(sizes, rows, our_layers=True)
    theirs, _, _ = systems.stock_model(sizes, rows)
    assert [weight.shape for weight in ours.weights] == [weight.shape for weight in theirs.weights]
    theirs.set_weights(ours.get_weights())
    x, _ = batches[0]
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
