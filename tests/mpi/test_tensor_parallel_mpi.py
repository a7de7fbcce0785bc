"""Models whose layers all ranks share, against the whole model, which each rank computes for itself.

Keras is imported inside functions: ``connected`` comes first, as in a user's script.

Legend: B rows, T tokens, V vocabulary, D width, L layers, R ranks.
"""

import zlib

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config

pytestmark = pytest.mark.ranks(2)

# 13 tokens and 12 heads: no number of ranks here divides the vocabulary, but one, and all divide the heads.
B, T, V, D, L = 2, 6, 13, 24, 2
CONFIG = Config(vocab_size=V, seq_len=T, width=D, heads=12, layers=L, global_batch_size=B)
TOKENS = (np.arange(400) * 5 % V).astype(np.uint16)  # which can be learnt
MODELS = {
    "transformer": {"dropout": 0.2},
    "transformer, untied": {"tie_embeddings": False},
    "lstm": {"model": "lstm", "dropout": 0.2},
    "lstm, untied": {"model": "lstm", "tie_embeddings": False},
}


def config_of(**values):
    return Config(**{**CONFIG.as_dict(), "data": CONFIG.data, **values})


def batch(seed=0):
    x, y = (np.random.default_rng(seed + i).integers(0, V, (B, T)).astype(np.int32) for i in range(2))
    y[0, 4:] = -1
    return x, y


def whole_and_own(comm, **values):
    """Replicas of the whole model and of this rank's part of it, of the same weights."""
    import keras

    from tf_dist.layers import tensor_parallel
    from tf_dist.models.build import build
    from tf_dist.parallel.sharding import part_of
    from tf_dist.runners.replica import Replica

    config = config_of(**values)
    whole, own = build(config), build(config, tensor_parallel(comm))
    # Weights that make everything matter: those it begins with are small.
    for number, (mine, theirs) in enumerate(
        zip(own.trainable_variables, whole.trainable_variables, strict=True)
    ):
        noise = np.random.default_rng(number).standard_normal(theirs.shape).astype(np.float32)
        theirs.assign(theirs.numpy() + 0.2 * noise)
        mine.assign(part_of(mine).take(theirs.numpy()))
    return [Replica(model, keras.optimizers.SGD(0.1), B, T, seed=1) for model in (whole, own)]


def gradients_of(replica, draw=(3, 1)):
    gradient, sums = replica.gradients(*batch(), draw)
    return replica.layout.views(gradient.copy()), sums


def crcs(arrays):
    return [zlib.crc32(np.ascontiguousarray(array)) for array in arrays]


# What more ranks would only repeat: four share two cores, and tracing takes most of the time.
few_ranks = pytest.mark.skipif(MPI.COMM_WORLD.size > 2, reason="two ranks show it")


@pytest.fixture(scope="module", params=MODELS)
def replicas(request, connected):
    return whole_and_own(connected, **MODELS[request.param])


def test_gradients(replicas, everyone):
    from tf_dist.parallel.sharding import part_of

    whole, own = replicas
    theirs, sums = gradients_of(whole)
    mine, own_sums = gradients_of(own)
    np.testing.assert_allclose(own_sums, sums, rtol=1e-6)
    parts = [part_of(variable) for variable in own.model.trainable_variables]
    for part, found, expected in zip(parts, mine, theirs, strict=True):
        np.testing.assert_allclose(found, part.take(expected), rtol=1e-5, atol=2e-6 * np.abs(expected).max())
    # Weights that all ranks hold would drift apart if one bit of their gradients were another.
    shared = [array for part, array in zip(parts, mine, strict=True) if part.ranges is None]
    assert everyone(crcs(shared)) == [crcs(shared)] * len(everyone(0))
    assert everyone(own_sums.tolist()) == [own_sums.tolist()] * len(everyone(0))


@few_ranks
def test_evaluation_and_logits(replicas, everyone):
    whole, own = replicas
    x, y = batch()
    np.testing.assert_allclose(own.evaluate(x, y), whole.evaluate(x, y), rtol=1e-6)
    logits = np.asarray(own.model(x))
    assert logits.shape == (B, T, V)
    np.testing.assert_allclose(logits, np.asarray(whole.model(x)), rtol=1e-5, atol=1e-5)
    assert len(set(everyone(zlib.crc32(logits)))) == 1


def test_all_ranks_say_the_same_in_the_same_order(replicas, connected, everyone):
    _, own = replicas
    said = []
    before = connected.before
    connected.before = lambda verb, array, root: said.append((verb, None if array is None else array.size))
    own.gradients(*batch(), (0, 0))
    own.evaluate(*batch())
    connected.before = before
    assert len(set(everyone(str(said)))) == 1
    assert bool(said) == (connected.size > 1)


@few_ranks
def test_chunks_of_the_vocabulary_s_part(connected, monkeypatch):
    """Where logits are large they come in chunks: on all ranks in as many, though some have a token more."""
    from tf_dist.runners import loss

    _, own = whole_and_own(connected)
    expected, sums = gradients_of(own)
    monkeypatch.setattr(loss, "CHUNK", 3 * -(-V // connected.size))
    monkeypatch.setattr(loss, "CHUNKED_FROM", 1)
    own.use_xla(False)
    own._compile(B)  # traced anew
    found, sums_in_chunks = gradients_of(own)
    np.testing.assert_allclose(sums_in_chunks, sums, rtol=1e-6)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@few_ranks
@pytest.mark.parametrize("name", ["transformer", pytest.param("lstm", marks=pytest.mark.extended)])
def test_bfloat16(connected, name):
    """As far from float32 as the whole model is."""
    exact = gradients_of(whole_and_own(connected, model=name)[1])[0]
    whole, own = whole_and_own(connected, model=name, precision="bfloat16")
    from tf_dist.parallel.sharding import part_of

    parts = [part_of(variable) for variable in own.model.trainable_variables]
    short = [part.take(array) for part, array in zip(parts, gradients_of(whole)[0], strict=True)]

    def error(arrays):
        pairs = list(zip(arrays, exact, strict=True))
        return sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs)

    mine = gradients_of(own)[0]
    assert all(array.dtype == np.float32 for array in mine)
    assert 0 < error(mine) < 2.5 * error(short) < 0.01


def trainer(comm, mesh, layers, **values):
    import keras

    from tf_dist.models.build import build
    from tf_dist.training.trainer import Trainer

    config = config_of(dropout=0.1, layers=1, **values)
    optimizer = keras.optimizers.AdamW(3e-3, weight_decay=0.01)
    return Trainer(
        build(config, layers), optimizer, comm, global_batch_size=B, micro_batch_size=B, seq_len=T,
        clip_norm=1.0, seed=3, mesh=mesh,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["transformer", pytest.param("lstm", marks=[few_ranks, pytest.mark.extended])]
)
def test_fifty_steps(connected, everyone, name):
    from tf_dist.layers import tensor_parallel
    from tf_dist.models.transformer import PLAIN
    from tf_dist.parallel.mesh import Mesh

    mesh = Mesh(connected, tensor=connected.size)
    alone = trainer(SerialComm(), None, PLAIN, model=name)
    together = trainer(connected, mesh, tensor_parallel(mesh.tensor), model=name)

    def logs_of(trained):
        sequences = trained.sequences(TOKENS)
        sampler = trained.sampler(sequences)
        logs = [trained.train_step(sequences, sampler) for _ in range(50)]
        return {key: [log[key] for log in logs] for key in logs[0]}, trained.validate(TOKENS[:100])

    (expected, validation), (found, own_validation) = logs_of(alone), logs_of(together)
    np.testing.assert_allclose(found["loss"], expected["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["grad_norm"], expected["grad_norm"], rtol=1e-4)
    assert found["tokens"] == expected["tokens"]
    assert expected["loss"][-1] < expected["loss"][0] - 0.01
    assert own_validation["val_loss"] == pytest.approx(validation["val_loss"], abs=1e-5)
    together.check_equal()  # what all ranks hold has not drifted apart


@pytest.mark.parametrize("elements", [1, 1000, 70_000])
def test_sums_have_the_same_bits_everywhere(connected, everyone, elements):
    """By messages, and in a shared window; and an array in use is not the one that the next sum is in."""
    from tf_dist.layers.mappings import sum_arrays

    def values(rank, turn):
        return np.random.default_rng([rank, turn]).standard_normal(elements).astype(np.float32)

    sums = [sum_arrays(connected, values(connected.rank, turn)) for turn in range(4)]
    assert len(set(map(tuple, everyone(crcs(sums))))) == 1
    for turn, found in enumerate(sums):
        expected = sum(values(rank, turn).astype(np.float64) for rank in range(connected.size))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_bytes_that_are_sent(connected):
    """Megatron's formula: 4 sums of activations a layer, one for the embedding and one for the logits.

    And one exchange of four numbers a token, for the loss; a sum sends 2 (R - 1) / R of its size.
    """
    from tf_dist.comm.transport.mpi import MPIComm

    comm = MPIComm(window=False)
    R = comm.size
    _, own = whole_and_own(comm)
    before = comm.sent_bytes
    own.gradients(*batch(), (0, 0))
    sums = (4 * L + 2) * (2 * 4 * B * T * D * (R - 1) // R)
    assert comm.sent_bytes - before == (0 if R == 1 else sums + (R - 1) * 4 * 4 * B * T)
