"""Models of rows: masks hide padding and the future; shapes, gradients, and cuts for pipelines and ZeRO-3."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from extended import EVERYTHING

from tf_dist.models import row_lstms, row_transformers
from tf_dist.models.attention import MASKED
from tf_dist.models.body_sizes import BodySizes
from tf_dist.models.row_layers import ConcatPooling, InQuestion
from tf_dist.models.row_layout import Head, RowLayout, Slots
from tf_dist.pipeline.model_partition import LayerGraph
from tf_dist.runners.replica import Replica
from tf_dist.zero.partition import segments

V, S, T, M = 20, 6, 4, 8
TEXT = RowLayout(Slots(S), Slots(T), V)
SIZES = BodySizes(layers=2, width=16, heads=2)
MODELS = {
    "encoder": (row_transformers.encoder, RowLayout(Slots(S), Slots(0), V), Head("classes", 3)),
    "masked": (row_transformers.encoder, RowLayout(Slots(S), Slots(0), V), Head("tokens")),
    "spans": (row_transformers.encoder, RowLayout(Slots(S), Slots(0), V), Head("spans")),
    "prefix": (row_transformers.prefix_decoder, TEXT, Head("tokens")),
    "seq2seq": (row_transformers.encoder_decoder, TEXT, Head("tokens")),
    "caption": (row_transformers.encoder_decoder, RowLayout(Slots(S, M), Slots(T), V), Head("tokens")),
    "speak": (row_transformers.encoder_decoder, RowLayout(Slots(S), Slots(T, M), V), Head("frames", M)),
    "pointing": (row_transformers.encoder_decoder, TEXT, Head("tokens", points=True)),
    "pointing prefix": (row_transformers.prefix_decoder, TEXT, Head("tokens", points=True)),
    "pointing lstm": (row_lstms.encoder_decoder, TEXT, Head("tokens", points=True)),
    "lstm encoder": (row_lstms.encoder, RowLayout(Slots(S), Slots(0), V), Head("classes", 3)),
    "lstm prefix": (row_lstms.prefix_decoder, TEXT, Head("tokens")),
    "lstm seq2seq": (row_lstms.encoder_decoder, TEXT, Head("tokens")),
    "lstm speak": (row_lstms.encoder_decoder, RowLayout(Slots(S), Slots(T, M), V), Head("frames", M)),
}
ONE_OF_EACH_HEAD = ["masked", "spans", "speak", "pointing", "lstm encoder"]
SEQ2SEQ = ["prefix", "seq2seq", "caption", "speak", "lstm prefix", "lstm seq2seq", "lstm speak"]
SEQ2SEQ += [name for name in MODELS if name.startswith("pointing")]


def build(name, sizes=SIZES):
    keras.utils.set_random_seed(1)
    function, layout, head = MODELS[name]
    return function(layout, sizes, head), layout


def words_of(slots, rng, rows=2):
    if not slots.width:
        return rng.integers(0, V, (rows, slots.words)).astype(np.int32)
    return rng.normal(size=(rows, slots.count * slots.width)).astype(np.float16).view(np.int32)


def row(layout, seed=0):
    rng = np.random.default_rng(seed)
    return np.concatenate([words_of(layout.source, rng), words_of(layout.target, rng)], axis=1)


def outputs(model, x):
    return np.asarray(model(x, training=False))


def test_tokens_of_the_question_are_marked_in_the_context():
    words = tf.constant([[7, 8, 1, 8, 9, 7, 0], [1, 8, 1, 1, 0, 0, 0], [0] * 7])  # 1 separates, 0 pads
    marks = InQuestion(separator=1)(words)
    np.testing.assert_array_equal(marks[..., 0], [[0, 0, 0, 1, 0, 1, 0], [0] * 7, [0] * 7])


def test_pooling_is_of_the_slots_that_hold_something():
    """The maximum and the mean; of a row of padding 0, and no gradient of NaN."""
    x = tf.constant(np.arange(12, dtype=np.float32).reshape(2, 3, 2) - 20)
    bias = tf.constant([[0.0, 0.0, MASKED], [MASKED] * 3])[:, None, None, :]
    with tf.GradientTape() as tape:
        tape.watch(x)
        pooled = ConcatPooling()(x, bias)
        total = tf.reduce_sum(pooled)
    np.testing.assert_array_equal(pooled, [[[-18, -17, -19, -18]], [[0, 0, 0, 0]]])
    gradient = tape.gradient(total, x).numpy()
    np.testing.assert_array_equal(gradient[0], [[0.5, 0.5], [1.5, 1.5], [0, 0]])
    assert not gradient[1].any()


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_gets_a_gradient(name):
    model, layout = build(name)
    replica = Replica(model, keras.optimizers.SGD(0.1), 2, layout.words, seed=1)
    y = np.random.default_rng(1).integers(0, 2, (2, replica.target_len)).astype(np.int32)
    x = row(layout)
    if name == "spans":  # a question, and a context that has a token of it
        x[:, 2], x[:, 3] = layout.separator, x[:, 0]
    gradient, sums = replica.gradients(x, y, (0, 0))
    assert np.isfinite(gradient).all() and sums[1] == y.size
    starts = replica.layout.starts
    silent = [
        v.path
        for v, a, b in zip(replica.variables, starts, starts[1:], strict=False)
        if not np.abs(gradient[a:b]).any()
    ]
    # The states that no prediction reads: rows of a table, and LSTM gates, may have none.
    assert not silent


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_target_sees_nothing_after_it(name):
    model, layout = build(name)
    x = row(layout)
    before = outputs(model, x)
    for slot in range(1, T):
        changed = x.copy()
        width = layout.target.words // T
        start = layout.source.words + slot * width
        changed[:, start : start + width] = row(layout, seed=7)[:, start : start + width]
        after = outputs(model, changed)
        np.testing.assert_array_equal(after[:, :slot], before[:, :slot])
        assert np.abs(after[:, slot:] - before[:, slot:]).max() > 1e-6


@pytest.mark.parametrize("name", ["encoder", "masked", "spans", "prefix", "seq2seq", "caption", "speak"])
def test_what_stands_in_padding_counts_for_nothing(name):
    """Attention must not see padding: other vectors there, by another embedding of it, change nothing."""
    model, layout = build(name)
    x = row(layout)
    width = layout.source.words // S
    x[:, (S - 2) * width : S * width] = -1 if layout.source.width else layout.pad
    before = outputs(model, x)
    if layout.source.width:
        path, place = "positions/positions", slice(S - 2, S)
    else:
        path, place = "embedding/embeddings", slice(layout.pad, layout.pad + 1)
    table = next(v for v in model.weights if v.path == path)
    value = np.asarray(table.value).copy()
    value[place] += 1.0
    table.assign(value)
    after = outputs(model, x)
    if name == "masked":  # its own logits, of padding and for it, do change
        before, after = before[:, : S - 2, :V], after[:, : S - 2, :V]
    if name in ("prefix", "seq2seq", "caption"):
        before, after = before[..., :V], after[..., :V]
    if name == "spans":
        before, after = before[..., : S - 2], after[..., : S - 2]
    np.testing.assert_allclose(after, before, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "together", [1, *(pytest.param(some, marks=pytest.mark.extended) for some in (1000, 1 << 30))]
)
def test_segments_are_the_model(name, together):
    """A mask of the rows crosses no cut: a segment that needs it takes the rows as well."""
    model, layout = build(name)
    state = x = tf.constant(row(layout))
    for segment in segments(model, together):
        state = segment.model([state, x] if segment.reads_rows else state, training=False)
    np.testing.assert_array_equal(np.asarray(state), outputs(model, x))


def test_a_pipeline_can_begin_a_stage_with_every_layer():
    for name, blocks in (("encoder", [0, 1]), ("prefix", [0, 1]), ("seq2seq", [0, 1, 2, 3])):
        graph = LayerGraph(build(name)[0])
        assert [p.block for p in graph.points if p.block is not None] == blocks


def test_a_row_of_padding_has_a_finite_loss_of_zero():
    for name in MODELS if EVERYTHING else ONE_OF_EACH_HEAD:
        model, layout = build(name)
        replica = Replica(model, keras.optimizers.SGD(0.1), 2, layout.words, seed=1)
        x = np.zeros((2, layout.words), np.int32)
        gradient, sums = replica.gradients(x, np.full((2, replica.target_len), -1, np.int32), (0, 0))
        assert sums.tolist() == [0, 0, 0] and not np.abs(gradient).any(), name
