"""Muon: what a matrix's update is, and which weights are matrices."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.config import Config
from tf_dist.models.build import build
from tf_dist.models.kernel_groups import groups_of
from tf_dist.optim.fused_optimizer import optimizer_step
from tf_dist.optim.muon import Muon, is_matrix, newton_schulz
from tf_dist.optim.optimizers import build as build_optimizer

SIZES = {"vocab_size": 30, "seq_len": 8, "layers": 1, "width": 16, "heads": 4}


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_it_is_orthonormal_and_that_of_keras(shape):
    matrix = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    found = np.asarray(newton_schulz(tf.constant(matrix), 5))
    values = np.linalg.svd(found, compute_uv=False)
    assert 0.6 < values.min() and values.max() < 1.3
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    assert np.sum(found * (u @ v)) / np.linalg.norm(found) / np.linalg.norm(u @ v) > 0.97
    theirs = keras.optimizers.Muon().zeropower_via_newtonschulz5(tf.constant(matrix), 5)
    np.testing.assert_allclose(found, theirs, atol=1e-4)


def test_matrices_and_what_stands_beside_each_other():
    model = build(
        Config(vocab_size=30, seq_len=8, layers=1, width=16, heads=4, kv_heads=2, tie_embeddings=False)
    )
    groups = {variable.path: groups_of(variable) for variable in model.weights if is_matrix(variable)}
    assert groups == {
        "layer_0_attention/query/kernel": 1,
        "layer_0_attention/key_value/kernel": 2,
        "layer_0_attention/output_projection/kernel": 1,
        "layer_0_feed_forward_in/kernel": 1,
        "layer_0_feed_forward_out/kernel": 1,
    }


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_of_the_flat_gradient_is_kerass_own(decay):
    """`model.fit` calls `apply`; the trainer one step for all."""
    config = Config(
        vocab_size=30, seq_len=8, layers=1, width=16, heads=4, optimizer="muon", weight_decay=decay
    )
    found = []
    for flat in (False, True):
        model = build(config)
        optimizer = build_optimizer(config, model, 10)
        assert isinstance(optimizer, Muon)
        optimizer.build(model.trainable_variables)
        step = optimizer_step(optimizer, model.trainable_variables)
        rng = np.random.default_rng(2)
        for _ in range(3):
            arrays = [rng.standard_normal(v.shape).astype(np.float32) for v in model.trainable_variables]
            if flat:
                whole = np.concatenate([array.reshape(-1) for array in arrays])
                step.apply(whole, np.float32(1))
            else:
                optimizer.apply([tf.constant(array) for array in arrays])
        found.append([np.asarray(variable) for variable in model.weights])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # iterations multiply what rounds


def test_it_is_saved():
    made = Muon.from_config(Muon(1e-2, momentum=0.9, ns_steps=4).get_config())
    assert (made.momentum, made.ns_steps) == (0.9, 4)
