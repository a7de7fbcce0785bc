"""Pipelines over real ranks, against the same training on one rank: p is the number of ranks.

Untied models end with the bits of one rank, whatever the schedule; tied ones within 1e-6, for the gradient of
the table is then added in another order. Keras is imported inside functions: ``connected`` comes first.
"""

import functools

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.ranks(2)

WORLD = MPI.COMM_WORLD.Dup()
V, T, D, B = 13, 6, 8, 2  # vocabulary, tokens, width, rows of a micro-batch
STEPS = 2
TOKENS = np.random.default_rng(1).integers(0, V, 400).astype(np.uint16)
HELD_OUT = TOKENS[:101]
ROW = TOKENS[None, :T].astype(np.int32)


def chain(policy="float32"):
    """Quickly traced, and with many places to cut at."""
    import keras
    from keras import layers

    tokens = keras.Input((T,), dtype="int32")
    x = layers.Embedding(V, D, dtype=policy)(tokens)
    for _ in range(8):
        x = layers.Dense(D, activation="tanh", dtype=policy)(x)
        x = layers.Dropout(0.2, dtype=policy)(x)
    return keras.Model(tokens, layers.Dense(V, dtype=policy)(x))


def gpt(tied):
    from tf_dist.models import transformer

    return transformer.build(V, T, 2, D, 2, 0.2, tied)


def lstm(tied):
    from tf_dist.models import lstm

    return lstm.build(V, T, 2, D, 0.2, tied)


MODELS = {
    "chain": chain,
    "bfloat16": functools.partial(chain, "mixed_bfloat16"),
    "transformer": functools.partial(gpt, False),
    "tied transformer": functools.partial(gpt, True),
    "lstm": functools.partial(lstm, False),
    "tied lstm": functools.partial(lstm, True),
}


def trained(name, comm, micro_batches=5, mesh=None, **pipeline):
    """A trainer after some steps, and all that it was told."""
    import keras

    from tf_dist.models.meta_init import outline
    from tf_dist.training.trainer import Trainer

    keras.utils.set_random_seed(1)
    with outline():
        model = MODELS[name]()
    made = Trainer(
        model, keras.optimizers.AdamW(1e-2, weight_decay=0.01), comm,
        global_batch_size=B * micro_batches, micro_batch_size=B, seq_len=T, clip_norm=0.5, seed=3,
        autotune="off", mesh=mesh, pipeline=pipeline,
    )  # fmt: skip
    sequences = made.sequences(TOKENS)
    sampler = made.sampler(sequences)
    logs = [made.train_step(sequences, sampler) for _ in range(STEPS)]
    return made, logs, made.validate(HELD_OUT), made.runner.logits(ROW)


@pytest.fixture(scope="module")
def alone(connected):
    """``alone(name, micro_batches)``: the same training on one rank, which the first one does for all."""
    if connected.size == 1:
        pytest.skip("a pipeline has two ranks or more")
    known = {}

    def train(name, micro_batches=5):
        if (name, micro_batches) not in known:
            mine = on_one_rank(name, micro_batches) if connected.rank == 0 else None
            known[name, micro_batches] = WORLD.bcast(mine)
        return known[name, micro_batches]

    return train


def on_one_rank(name, micro_batches):
    made, logs, result, logits = trained(name, SerialComm(), micro_batches)
    whole = made.whole()
    weights = np.concatenate([array.ravel() for _, array in whole.tensors(whole.weights)])
    return logs, result, logits, whole.weights_sha256(), weights


def assert_equal(outcome, expected, everyone):
    """In bits: weights, losses, norms, validation and logits, on every rank."""
    made, logs, result, logits = outcome
    assert made.whole().weights_sha256() == expected[3]
    assert all(everyone((logs, result) == expected[:2]))
    assert all(everyone(np.array_equal(logits, expected[2])))


def pipelined(name, comm, micro_batches=5, **pipeline):
    return trained(name, comm, micro_batches, Mesh(comm, pipeline=comm.size), **pipeline)


@pytest.mark.ranks(3)  # a stage between two others
@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble"])
def test_schedules_are_one_rank(connected, alone, everyone, schedule):
    """The other two: `test_activations_kept_and_bytes_sent`."""
    outcome = pipelined("chain", connected, pipeline_schedule=schedule)
    assert_equal(outcome, alone("chain"), everyone)


@pytest.mark.parametrize(
    ("name", "schedule", "recompute"),
    [
        ("transformer", "interleaved", "on"),
        pytest.param("transformer", "zero-bubble", "off", marks=pytest.mark.extended),
        ("lstm", "zero-bubble", "on"),
        ("bfloat16", "1f1b", "off"),
    ],
)
def test_models_without_ties_are_one_rank(connected, alone, everyone, name, schedule, recompute):
    if schedule == "interleaved" and connected.size == 4:
        schedule = "1f1b"  # eight stages of two layers: one would have no weights
    outcome = pipelined(name, connected, pipeline_schedule=schedule, recompute=recompute)
    assert_equal(outcome, alone(name), everyone)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("tied transformer", "1f1b"),
        pytest.param("tied lstm", "zero-bubble", marks=pytest.mark.extended),
    ],
)
def test_tied_tables_are_one_rank_within_rounding(connected, alone, everyone, name, schedule):
    logs_alone, result_alone, logits_alone, _, weights_alone = alone(name)
    made, logs, result, logits = pipelined(name, connected, pipeline_schedule=schedule)
    whole = made.whole()
    tensors = [array.ravel() for _, array in whole.tensors(whole.weights)]
    if connected.rank == 0:
        assert float(np.abs(np.concatenate(tensors) - weights_alone).max()) <= 1e-6
    for mine, theirs in zip([*logs, result], [*logs_alone, result_alone], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    np.testing.assert_allclose(logits, logits_alone, atol=1e-5)
    check_the_ends_have_one_table(made, everyone)


def check_the_ends_have_one_table(made, everyone):
    """First and last stage hold it, and end each step with the same bits of it."""
    tables = [v for v in made.replica.variables if v.path == "embedding/embeddings"]
    held = [one for one in everyone([np.asarray(v.value).tobytes() for v in tables]) if one]
    assert len(held) == min(2, made.comm.size)
    assert held[0] == held[-1]


@pytest.mark.ranks(3)
def test_fewer_micro_batches_than_stages(connected, alone, everyone):
    outcome = pipelined("chain", connected, 1, pipeline_schedule="interleaved")
    assert_equal(outcome, alone("chain", 1), everyone)


@pytest.mark.ranks(4)
def test_pipelines_beside_each_other_and_one_without_work(connected, alone, everyone):
    """Two pipelines, and where there is one micro-batch only, the second does nothing and hangs nobody."""
    if connected.size % 2 or connected.size < 4:
        pytest.skip("two pipelines need an even number of ranks, two each at least")
    for micro_batches in (1, 3):
        mesh = Mesh(connected, pipeline=connected.size // 2)
        outcome = trained("chain", connected, micro_batches, mesh, pipeline_schedule="zero-bubble")
        assert_equal(outcome, alone("chain", micro_batches), everyone)


def test_activations_kept_and_bytes_sent(connected, alone, everyone):
    """GPipe keeps all micro-batches, or as many as it may; 1f1b as many as there are ranks to the end."""
    m, p, rank = 5, connected.size, connected.rank
    kept = {}
    for schedule, more in (("gpipe", {}), ("gpipe", {"micro_batches_in_flight": 2}), ("1f1b", {})):
        outcome = pipelined("chain", connected, m, pipeline_schedule=schedule, **more)
        assert_equal(outcome, alone("chain", m), everyone)
        passes = outcome[0].runner
        assert passes.kept_bytes == 0, "after a step nothing is kept"
        assert 0 <= passes.spent.waited_s <= passes.spent.elapsed_s
        kept[schedule, *more] = passes.peak_kept_bytes
    if rank < p - 1:
        each, rest = divmod(kept["gpipe",], m)
        assert rest == 0
        assert kept["gpipe", "micro_batches_in_flight"] == 2 * each
        assert kept["1f1b",] == min(m, p - rank) * each
    check_bytes_sent(outcome[0], m)


def check_bytes_sent(made, micro_batches):
    """A neighbour on either side gets (B, T, D) float32 of each micro-batch."""
    from tf_dist.training.micro_batch_feed import MicroBatchFeed

    sequences = made.sequences(TOKENS)
    feed = MicroBatchFeed(made.state, made.rows, made.my_micro_batches)
    batches = feed.next(sequences, made.sampler(sequences))
    before = made.comm.sent_bytes

    class Nowhere:
        def add(self, number, sums):
            pass

    made.runner.forward_backward(9, batches, Nowhere())
    neighbours = (made.comm.rank > 0) + (made.comm.rank < made.comm.size - 1)
    assert made.comm.sent_bytes - before == neighbours * micro_batches * 4 * B * T * D


@pytest.mark.ranks(3)
def test_cuts_by_hand(connected, alone, everyone):
    """Stages as uneven as can be."""
    cuts = ",".join(str(2 * i + 1) for i in range(connected.size - 1))
    outcome = pipelined("chain", connected, pipeline_cuts=cuts)
    assert_equal(outcome, alone("chain"), everyone)
