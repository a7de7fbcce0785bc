"""PyTorch's models are ours: the same weights give the same loss and gradient. Needs `make torch`."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tf_dist.bench import models, runner

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not runner.TORCH.exists(), reason=runner.HOW_TO_GET["torch"])


@pytest.mark.parametrize("name", ["tiny-gpt", "tiny-lstm"])
def test_the_same_weights_give_the_same_loss_and_gradient(name, tmp_path):
    import tensorflow as tf

    from tf_dist.config import Config
    from tf_dist.models.build import build

    sizes = models.RECIPES[name].sizes
    model = build(Config(vocab_size=models.VOCABULARY, **sizes))
    random = np.random.default_rng(1)
    for variable in model.trainable_variables:  # biases and gains, too, must find their place
        variable.assign(variable + random.normal(scale=0.1, size=variable.shape).astype(np.float32))
    ids = random.integers(0, models.VOCABULARY, (3, sizes["seq_len"] + 1)).astype(np.int32)
    x, y = ids[:, :-1], ids[:, 1:]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x)))
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    norm = tf.linalg.global_norm([tf.convert_to_tensor(part) for part in gradients])

    file = tmp_path / "weights.npz"
    weights = {variable.path: np.asarray(variable.value) for variable in model.trainable_variables}
    np.savez(file, x=x, y=y, **weights)
    command = [runner.TORCH, "-m", "tf_dist.bench.torch_ways", "loss", name, file]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
