"""Packed documents: what stands beside a document in its row does not matter to it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.config import Config
from tf_dist.decoding.decode import decode
from tf_dist.decoding.sampling import GREEDY, Sampling
from tf_dist.errors import UsageError
from tf_dist.models.build import build
from tf_dist.models.incremental import NotIncremental
from tf_dist.models.stock import not_stock, stock_model
from tf_dist.pipeline.cached_pipeline import CachedPipeline
from tf_dist.pipeline.model_partition import LayerGraph
from tf_dist.runners.cached_forward import CachedModel
from tf_dist.runners.decoding_forward import forward_of_model
from tf_dist.runners.replica import Replica
from tf_dist.tasks.registry import task_of
from tf_dist.training.model import build_model
from tf_dist.zero.partition import segments

V, T, END = 13, 12, 5
PACKED = {"documents": "packed", "end_of_text": END}
DOCUMENT = [1, 2, 3, 4, END]


def made(**values):
    config = Config(vocab_size=V, seq_len=T, width=16, heads=2, layers=2, **values)
    model = build_model(config)
    for number, variable in enumerate(model.trainable_variables):
        noise = np.random.default_rng(number).standard_normal(variable.shape).astype(np.float32)
        variable.assign(variable.numpy() + 0.3 * noise)
    return model


def row(before, after, document=DOCUMENT):
    ids = [*before, *document, *after]
    return np.array([ids + [0] * (T - len(ids))], np.int32)


def logits_of_document(model, before, after, document=DOCUMENT):
    logits = np.asarray(tf.cast(model(row(before, after, document), training=False), tf.float32))
    return logits[0, len(before) : len(before) + len(document)]


# Other tokens, other lengths, several documents, none.
NEIGHBOURS = [([], []), ([7, END], [8]), ([9, 8, 7, END], [1, 1]), ([7, END, 8, 8, END], [END])]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_documents_logits_do_not_depend_on_its_neighbours(precision):
    model = made(precision=precision, **PACKED)
    alone = logits_of_document(model, [], [])
    # Elsewhere in a row sums over keys have another order: their last bit, in bfloat16 one of eight.
    atol = 1e-6 if precision == "float32" else 2**-7 * float(np.abs(alone).max())
    for before, after in NEIGHBOURS[1:]:
        np.testing.assert_allclose(logits_of_document(model, before, after), alone, rtol=0, atol=atol)


def test_those_of_windows_do():
    model = made()
    alone = logits_of_document(model, [], [])
    for before, after in NEIGHBOURS[1:]:
        assert np.abs(logits_of_document(model, before, after) - alone).max() > 1e-2


def test_of_one_document_both_are_the_same():
    x = np.random.default_rng(0).integers(6, V, (3, T)).astype(np.int32)
    np.testing.assert_allclose(made(**PACKED)(x), made()(x), rtol=0, atol=1e-6)


def test_no_token_sees_a_later_one():
    model, x = made(**PACKED), row([7, 8, END], [9, 9])
    before = model(x).numpy()
    for place in range(1, T):
        changed = x.copy()
        changed[0, place] = 11 if x[0, place] != END else 12
        np.testing.assert_array_equal(model(changed).numpy()[0, :place], before[0, :place])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_of_a_document_do_not_depend_on_its_neighbours(dropout):
    """Also where attention weights are dropped: the mask holds there as well."""

    def gradient(before):
        model = made(dropout=dropout, **PACKED)
        replica = Replica(model, keras.optimizers.SGD(0.1), 1, T, seed=1)
        x = row([*before, END], [])
        y = np.full_like(x, -1)
        y[0, 4:8] = DOCUMENT[1:]
        return replica.gradients(x, y, (0, 0))[0]

    np.testing.assert_allclose(gradient([6, 7, 8]), gradient([9, 1, 1]), rtol=0, atol=1e-5)


def masked_lm(**more):
    model = made(task="masked-lm", **more)

    def logits(before, after):
        return model(row(before, after), training=False).numpy()[0, len(before) : len(before) + len(DOCUMENT)]

    return logits


def test_an_encoder_sees_both_sides_of_its_document_and_no_other():
    packed, windows = masked_lm(**PACKED), masked_lm()
    for before, after in NEIGHBOURS[1:]:
        np.testing.assert_allclose(packed(before, after), packed([], []), rtol=0, atol=1e-5)
        assert np.abs(windows(before, after) - windows([], [])).max() > 1e-2
    model = made(task="masked-lm", **PACKED)
    first, other = model(row([], [])).numpy(), model(row([], [], [1, 2, 3, 9, END])).numpy()
    assert np.abs(first[0, 0] - other[0, 0]).max() > 1e-3  # what follows counts


@pytest.mark.parametrize("together", [1, 1000, 1 << 30])
@pytest.mark.parametrize("task", ["causal-lm", "masked-lm"])
def test_segments_and_stages_are_the_model(task, together):
    model = made(task=task, **PACKED)
    state = x = tf.constant(row([7, 8, END], [9, 9]))
    for segment in segments(model, together):
        state = segment.model([state, x] if segment.reads_rows else state, training=False)
    np.testing.assert_array_equal(np.asarray(state), model(x).numpy())
    assert [p.block for p in LayerGraph(model).points if p.block is not None] == [0, 1]


def test_in_stock_layers_it_is_the_same_model():
    model, x = made(**PACKED), row([7, 8, END], [9, 9])
    stock = stock_model(model)
    np.testing.assert_allclose(stock(x).numpy(), model(x).numpy(), rtol=0, atol=1e-3)
    assert {one.__name__ for one in not_stock(stock)} == {"DocumentBias", "DocumentPlaces"}


# Decoding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cached_logits_are_those_of_the_row(precision):
    """Prompts with ends of documents in them, of different lengths at once, then token by token."""
    model = made(precision=precision, **PACKED)
    ids_BxT = np.random.default_rng(3).integers(0, V, (3, T)).astype(np.int32)
    ids_BxT[0, 2], ids_BxT[1, 5], ids_BxT[2, 7:9] = END, END, END
    whole_BxTxV = np.asarray(tf.cast(model(ids_BxT), tf.float32))
    forward, rows = CachedModel(model, T), np.arange(3)
    read_B, worst = np.array([4, 1, 6], np.int32), 0.0
    logits_BxV, state = forward(ids_BxT[:, :6], np.zeros(3, np.int32), read_B, forward.begin(3, T))
    for _ in range(T - 6):
        worst = max(worst, np.abs(logits_BxV - whole_BxTxV[rows, read_B - 1]).max())
        x_Bx1 = ids_BxT[rows, read_B][:, None]
        logits_BxV, state = forward(x_Bx1, read_B, np.ones(3, np.int32), state)
        read_B = read_B + 1
    assert worst < (1e-5 if precision == "float32" else 0.06) * np.abs(whole_BxTxV).max()


@pytest.mark.parametrize("strategy", [GREEDY, Sampling(1.0, seed=4)], ids=str)
def test_text_is_the_same_with_and_without_a_cache(strategy, monkeypatch):
    """Beyond the end of the window as well."""
    model, prompts = made(**PACKED), [[7, END, 1, 2], [1, 2], [END, 3, 3]]
    cached = decode(forward_of_model(model, T), prompts, strategy, 2 * T)

    def refuse(*_):
        raise NotIncremental("for this test")

    monkeypatch.setattr("tf_dist.runners.decoding_forward.CachedModel", refuse)
    plain = decode(forward_of_model(model, T), prompts, strategy, 2 * T)
    assert [one.ids for one in cached] == [one.ids for one in plain]


def test_a_pipeline_decodes_such_a_model_without_a_cache_on_every_rank():
    model = made(**PACKED)
    with pytest.raises(NotIncremental, match="token ids"):
        _pipeline(model)


def _pipeline(model):
    class Mesh:
        pipeline = None

    return CachedPipeline(model, {}, Mesh(), None, T)


# Refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"model": "lstm"}, "documents windows"),
        ({"sequence_parallel": 2}, "sequence_parallel 1"),
    ],
)
def test_what_cannot_keep_documents_apart_is_refused_before_anything_is_read(options, word):
    with pytest.raises(UsageError, match=word):
        Config(documents="packed", **options)


def test_rows_of_tables_are_no_running_text():
    with pytest.raises(UsageError, match="--documents packed"):
        task_of(Config(task="classify", documents="packed"))


def test_a_model_must_know_what_ends_a_document():
    with pytest.raises(UsageError, match="end_of_text"):
        build(Config(vocab_size=V, documents="packed"))
