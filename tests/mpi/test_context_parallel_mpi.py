"""Rows that ranks share, in compiled steps on real ranks, against one rank that has whole rows.

Keras is imported inside functions: ``connected`` comes first, as in a user's script.

Legend: B rows, T tokens, V vocabulary.
"""

import dataclasses

import numpy as np
import pytest
from conftest import from_rank_0

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.parallel.context_partition import columns
from tf_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.ranks(4)  # a ring of all, and of two beside data or tensor

B, T, V = 2, 12, 13
CONFIG = Config(vocab_size=V, seq_len=T, width=16, layers=2, heads=2, global_batch_size=B)
ONE_LAYER = dataclasses.replace(CONFIG, layers=1)  # quicker to trace, four times


def batch(seed=0):
    x = np.random.default_rng(seed).integers(0, V, (B, T)).astype(np.int32)
    y = np.roll(x, -1, axis=1)
    y[:, -1] = -1
    return x, y


def replica_of(model, seq_len):
    import keras

    from tf_dist.runners.replica import Replica

    # Weights that make attention and positions matter: those it begins with are small.
    for number, variable in enumerate(model.trainable_variables):
        noise = np.random.default_rng(number).standard_normal(variable.shape)
        variable.assign(variable.numpy() + 0.1 * noise.astype(np.float32))
    return Replica(model, keras.optimizers.SGD(0.1), B, seq_len, seed=1)


def of_one_rank_and_shared(mesh, config=ONE_LAYER):
    """A replica of whole rows, and one of this rank's columns of them."""
    from tf_dist.layers.context_parallel import sequence_parallel
    from tf_dist.models.build import build

    shared = build(config, sequence_parallel(mesh.sequence, config.seq_len))
    return (
        replica_of(build(config), config.seq_len),
        replica_of(shared, config.seq_len // mesh.sequence.size),
    )


@pytest.fixture(scope="module")
def ring(connected):
    """All ranks as one ring: the mesh, and the two replicas."""
    mesh = Mesh(connected, sequence=connected.size)
    return mesh, *of_one_rank_and_shared(mesh)


def mine(mesh, array_BxT):
    return np.ascontiguousarray(array_BxT[:, columns(array_BxT.shape[1], *along(mesh))])


def along(mesh):
    return mesh.sequence.rank, mesh.sequence.size


def assert_near(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, atol=tolerance * max(1, np.abs(expected).max()))


def test_loss_and_gradients_are_those_of_one_rank(ring):
    mesh, whole, shared = ring
    x, y = batch()
    gradient, sums = whole.gradients(x, y, (0, 0))
    part, own_sums = (one.copy() for one in shared.gradients(mine(mesh, x), mine(mesh, y), (0, 0)))
    mesh.sequence.allreduce(part)
    mesh.sequence.allreduce(own_sums)
    assert own_sums[1] == sums[1] == B * (T - 1)
    assert_near(own_sums, sums)
    assert_near(part, gradient)
    evaluated = shared.evaluate(mine(mesh, x), mine(mesh, y)).copy()
    mesh.sequence.allreduce(evaluated)
    assert_near(evaluated, sums)


def test_logits_are_those_of_one_rank(ring):
    mesh, whole, shared = ring
    x, _ = batch()
    assert_near(np.asarray(shared.model(mine(mesh, x))), mine(mesh, np.asarray(whole.model(x))))


STEPS = 20
TOKENS = np.random.default_rng(1).integers(0, V, 700).astype(np.uint16)
HELD_OUT = np.random.default_rng(2).integers(0, V, 61).astype(np.uint16)


def training(comm, mesh, **options):
    """Losses and norms of 20 steps of a tiny Transformer, its validation, and the logits of a row."""
    import keras

    from tf_dist.training.model import model_for
    from tf_dist.training.trainer import Trainer

    sizes = {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": T, "clip_norm": 1.0}
    optimizer = keras.optimizers.AdamW(1e-3)
    trainer = Trainer(model_for(CONFIG, mesh), optimizer, comm, mesh=mesh, autotune="off", **sizes, **options)
    sequences = trainer.sequences(TOKENS)
    sampler = trainer.sampler(sequences)
    trainer.broadcast_weights()
    logs = [trainer.train_step(sequences, sampler) for _ in range(STEPS)]
    losses = np.array([[log["loss"], log["grad_norm"], log["tokens"]] for log in logs])
    trainer.check_equal()
    return losses, trainer.validate(HELD_OUT), trainer.runner.logits(TOKENS[None, :T].astype(np.int32))


@pytest.fixture(scope="module")
def serial(connected):
    """The training on one rank."""
    alone = SerialComm()
    return from_rank_0(lambda: training(alone, Mesh(alone)))


@pytest.mark.parametrize("other", ["data", "tensor"])
def test_training_is_that_of_one_rank(connected, serial, other):
    """Rows shared by all ranks; of four ranks by two, beside data with ZeRO, or tensor."""
    size, four = connected.size, connected.size == 4
    if other == "tensor" and not four:
        pytest.skip("needs four ranks")
    mesh = Mesh(connected, sequence=2 if four else size, tensor=2 if other == "tensor" else 1)
    update = "zero" if other == "data" and four else "allreduce"
    logs, result, logits = training(connected, mesh, update=update)
    np.testing.assert_allclose(logs, serial[0], rtol=1e-5)
    assert result == pytest.approx(serial[1], rel=1e-5)
    np.testing.assert_allclose(logits, serial[2], atol=1e-5)


def with_gradients(function, *inputs):
    """What attention gives in a compiled step, and the gradients of a weighted sum of it."""
    import tensorflow as tf

    @tf.function
    def compiled(q, k, v, weights):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            attended = function(q, k, v)
            total = tf.reduce_sum(tf.cast(attended * weights, tf.float32))
        return attended, *tape.gradient(total, [q, k, v])

    return [np.asarray(tf.cast(one, tf.float32)) for one in compiled(*inputs)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rings_beside_each_other(connected, dtype):
    """Of a grid of data x sequence, each ring has its own rows, in either type."""
    import tensorflow as tf

    from tf_dist.layers.ring_attention import RingAttention
    from tf_dist.models.attention import plain_attention

    mesh = Mesh(connected, sequence=1 if connected.size % 2 else 2)
    random = np.random.default_rng(mesh.at[0])
    inputs = [tf.cast(random.standard_normal((B, 2, T, 4)), dtype) for _ in range(4)]
    exact = with_gradients(plain_attention, *(tf.cast(one, tf.float32) for one in inputs))
    alone = with_gradients(plain_attention, *inputs)
    own = columns(T, *along(mesh))
    found = with_gradients(
        RingAttention(mesh.sequence, block=2), *(tf.gather(x, own, axis=2) for x in inputs)
    )
    for a, b, c in zip(found, exact, alone, strict=True):
        error = np.abs(a - b[:, :, own]).max()
        assert error < (1e-5 if dtype == "float32" else max(0.02, 2 * np.abs(c - b).max()))
