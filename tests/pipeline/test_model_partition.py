"""A model cut into segments: where, and that the segments together are the model."""

import functools
from itertools import combinations, pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.models import lstm, transformer
from tf_dist.models.meta_init import is_deferred, materialize, outline
from tf_dist.pipeline.graph_partition import bytes_of
from tf_dist.pipeline.model_partition import LayerGraph, balanced, choose, costs
from tf_dist.pipeline.stage import Stage, StageInputs, StageVariant
from tf_dist.runners.replica import Replica
from tf_dist.runners.rng import generator_states, random_states

V, T, ROWS = 13, 6, 2
RANDOM = np.random.default_rng(1)
X = RANDOM.integers(0, V, (ROWS, T)).astype(np.int32)
Y = np.where(RANDOM.random((ROWS, T)) < 0.2, -1, RANDOM.integers(0, V, (ROWS, T))).astype(np.int32)


def gpt(layer_count=2, tied=False, dropout=0.3):
    keras.utils.set_random_seed(1)
    return transformer.build(V, T, layer_count, 8, 2, dropout, tied)


def chain(*middle):
    keras.utils.set_random_seed(1)
    tokens = keras.Input((T,), dtype="int32")
    x = layers.Embedding(V, 8)(tokens)
    for layer in middle:
        x = layer(x)
    return keras.Model(tokens, layers.Dense(V)(x))


def cut(model, count, wanted=""):
    graph = LayerGraph(model)
    return graph.segments(choose(graph, count, wanted))


def refusal(function, *arguments):
    with pytest.raises(UsageError) as caught:
        function(*arguments)
    return str(caught.value)


# Where ---------------------------------------------------------------------------------------------


def test_a_transformer_is_cut_between_blocks_and_their_halves():
    points = LayerGraph(gpt(3)).points
    blocks = {point.block: point.next for point in points if point.block is not None}
    assert blocks == {i: f"layer_{i}_attention_norm" for i in range(3)}
    halves = [point.next for point in points if point.block is None]
    assert halves == [
        "positions", "embedding_dropout", *(f"layer_{i}_feed_forward_norm" for i in range(3)), "final_norm",
    ]  # fmt: skip


def test_an_lstm_is_cut_anywhere_but_before_its_last_product():
    model = lstm.build(V, T, 2, 8, 0.1)
    assert [point.next for point in LayerGraph(model).points] == [
        "embedding_dropout", "layer_0", "layer_0_dropout", "layer_1", "layer_1_dropout",
    ]  # fmt: skip


def test_costs_are_multiply_adds_for_each_token():
    D, L = 8, 2
    model = gpt(L)
    graph = LayerGraph(model)
    by_name = {node.operation.name: cost for node, cost in zip(graph.nodes, costs(graph.nodes), strict=True)}
    assert by_name["layer_0_attention"] == 4 * D * D + 2 * T * D + D
    assert by_name["layer_0_feed_forward_in"] == 4 * D * D + 4 * D
    assert by_name["positions"] == D  # its table is added, not multiplied with
    assert by_name["embedding"] == V * D + V  # the last call of it: the product; looking up costs nothing
    assert costs(graph.nodes)[0] == D


@pytest.mark.parametrize(("kind", "most"), [("transformer", 2 * 3 + 3), ("lstm", 3 + 2)])
def test_as_many_stages_as_a_model_has_parts_with_weights(kind, most):
    model = gpt(3) if kind == "transformer" else lstm.build(V, T, 3, 8, 0.1)
    assert len(cut(model, most)) == most
    refusal(choose, LayerGraph(model), most + 1)


def test_cuts_that_are_refused_before_tensorflow_starts():
    Config(pipeline_parallel=3, pipeline_cuts="1,2")
    for cuts in ("1", "1,2,3", "a,b", "1,"):
        assert "2 layers with which a stage begins are needed" in refusal(
            functools.partial(Config, pipeline_parallel=3, pipeline_cuts=cuts)
        )


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_dearest_segment_is_as_cheap_as_can_be(count):
    graph = LayerGraph(gpt(3))
    each = costs(graph.nodes)

    def dearest(cuts):
        places = [0, *(graph.points[at].place for at in cuts), len(each)]
        return max(sum(each[a:b]) for a, b in pairwise(places))

    best = min(dearest(cuts) for cuts in combinations(range(len(graph.points)), count - 1))
    assert dearest(balanced(graph, count)) == best
    segments = cut(gpt(3), count)
    assert max(segment.cost for segment in segments) == best
    assert sum(segment.cost for segment in segments) == sum(each)


def test_cuts_by_name():
    assert [point.next for point in choose(LayerGraph(gpt(3)), 3, "1,2")] == [
        "layer_1_attention_norm", "layer_2_attention_norm",
    ]  # fmt: skip
    model = chain(layers.Dense(8, name="a"), layers.Dense(8, name="b"))
    assert [point.next for point in choose(LayerGraph(model), 2, "2")] == ["b"]


def test_cuts_that_cannot_be():
    graph = LayerGraph(gpt(3))
    for wanted, said in {
        "2,1": "each must be larger than the one before",
        "1,1": "each must be larger than the one before",
        "1,3": "a stage can begin with block 0, 1, 2; 3 is not among them",
        "1": "has 1 cuts, 3 stages need 2",
        "1;2": "numbers are needed, as in 2,4",
    }.items():
        text = refusal(choose, graph, 3, wanted)
        assert text.startswith(f"--pipeline-cuts {wanted}"), text
        assert said in text
    bare = LayerGraph(chain(layers.Dropout(0.1), layers.Dense(8), layers.Activation("relu")))
    assert len(bare.points) == 4
    assert "has too few layers with trained weights for 5 stages" in refusal(choose, bare, 5)
    assert all(segment.trainable for segment in bare.segments(choose(bare, 3)))
    short = LayerGraph(chain(layers.Dense(8, name="a")))
    assert "can be cut at 2 places, 4 stages need 3 cuts: a stage can begin with 1 (a)" in refusal(
        choose, short, 4
    )


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(V)

    def call(self, tokens):
        return self.dense(keras.ops.one_hot(tokens, V))


def test_models_that_cannot_be_cut():
    assert "Subclassed: only functional and sequential models" in refusal(LayerGraph, Subclassed())
    tokens = keras.Input((T,), dtype="int32")
    masked = keras.Model(tokens, layers.Dense(V)(layers.Embedding(V, 8, mask_zero=True)(tokens)))
    assert "makes a mask" in refusal(LayerGraph, masked)
    drop = layers.Dropout(0.1, name="drop")
    twice = chain(drop, layers.Dense(8), layers.Dense(8, name="behind"), drop)
    graph = LayerGraph(twice)
    points = [next(point for point in graph.points if point.next == "behind")]
    assert "'drop' draws random numbers and is used in stages 0 and 1" in refusal(graph.segments, points)
    points = [graph.points[0], graph.points[1]]  # around a layer that only drops
    plain = LayerGraph(chain(layers.Activation("relu"), layers.Dense(8)))
    assert "has no trainable weights" in refusal(plain.segments, plain.points[:2])


def test_tied_and_untied_tables():
    first, last = cut(gpt(tied=True), 2)
    assert {v.path for v in first.trainable} & {v.path for v in last.trainable} == {"embedding/embeddings"}
    first, last = cut(gpt(tied=False), 2)
    assert first.trainable[0].path == "embedding/embeddings"
    assert last.trainable[0].path == "embedding/reverse_embeddings"
    assert len(first.trainable) + len(last.trainable) == len(gpt(tied=False).trainable_variables)


def test_only_one_segment_needs_its_weights():
    with outline():
        model = gpt()
    first, last = cut(model, 2)
    materialize(last.variables)
    assert all(is_deferred(variable) for variable in first.variables)
    states = np.zeros((ROWS, T, 8), np.float32)
    assert last.model(states).shape == (ROWS, T, V)


# Together they are the model -------------------------------------------------------------------------


def stages(model, count, wanted="", **way):
    made = []
    for number, segment in enumerate(cut(model, count, wanted)):
        first, last = number == 0, number == count - 1
        shape = (ROWS, T) if first else (ROWS, *segment.model.inputs[0].shape[1:])
        how = StageVariant(first, last, **{**way, "at_once": way.get("at_once", False) and last})
        runs = [range(len(segment.trainable))]
        made.append(Stage(segment, generator_states(model), shape, T, T, how, runs))
    return made


def passed_through(made, given):
    """Forward and backward through all stages: sums, gradients by variable, and what was kept."""
    x, held = X, []
    for stage in made:
        x, kept = stage.forward(tf.convert_to_tensor(x), given)
        held.append(kept)
    sums, dy, gradients = x, None, {}
    for stage, kept in reversed(list(zip(made, held, strict=True))):
        dy, late, dw, rest = stage.backward(kept, dy)
        sums = sums if late is None else late
        if stage.way.split:
            assert not dw
            dw = stage.weights(rest)
        sizes = np.cumsum([int(np.prod(v.shape)) for v in stage.segment.trainable])[:-1]
        parts = np.split(np.asarray(dw[0]), sizes)
        gradients.update(zip([v.path for v in stage.segment.trainable], parts, strict=True))
    return np.asarray(sums), gradients, [bytes_of(kept) for kept in held]


def given(model):
    states = random_states(5, (3, 2), len(generator_states(model)))
    return StageInputs(*map(tf.convert_to_tensor, (Y, np.float32(np.count_nonzero(Y >= 0)), states)))


WAYS = [{}, {"split": True}, {"recompute": True}, {"at_once": True}, {"split": True, "at_once": True}]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "plain")
@pytest.mark.parametrize("kind", ["transformer", "lstm"])
def test_chained_stages_are_the_model(kind, way):
    """In bits: the sums, and the gradient of every weight, with dropout."""
    keras.utils.set_random_seed(1)
    model = gpt() if kind == "transformer" else lstm.build(V, T, 2, 8, 0.3, tie_embeddings=False)
    whole = Replica(model, keras.optimizers.SGD(), ROWS, T, seed=5)
    expected, sums = whole.gradients(X, Y, (3, 2))
    found, gradients, _ = passed_through(stages(model, 2, **way), given(model))
    assert found.tolist() == sums.tolist()
    for variable, part in zip(whole.variables, whole.layout.views(np.array(expected)), strict=True):
        np.testing.assert_array_equal(gradients[variable.path], part.ravel(), variable.path)


def test_recomputing_keeps_the_input_alone():
    model = gpt()
    _, _, plain = passed_through(stages(model, 2), given(model))
    _, _, again = passed_through(stages(model, 2, recompute=True), given(model))
    carried = 4 * ROWS * T * 8
    targets_and_states = Y.nbytes + 4 + 16 * len(generator_states(model))
    assert again == [X.nbytes + targets_and_states, carried + targets_and_states]
    assert min(plain) > 5 * carried


def test_losses_of_layers_count_once_for_every_target():
    model = chain(
        layers.Dense(8, kernel_regularizer=keras.regularizers.L2(0.01)),
        layers.Dense(8, activity_regularizer=keras.regularizers.L2(0.02), kernel_regularizer="l1"),
    )
    whole = Replica(model, keras.optimizers.SGD(), ROWS, T, seed=5)
    expected, _ = whole.gradients(X, Y, (3, 2))
    _, gradients, _ = passed_through(stages(model, 2), given(model))
    for variable, part in zip(whole.variables, whole.layout.views(np.array(expected)), strict=True):
        np.testing.assert_allclose(gradients[variable.path], part.ravel(), rtol=1e-6, atol=1e-7)


@keras.saving.register_keras_serializable("tests")
class DrawsGlobally(layers.Dense):
    def call(self, x, training=False):
        return super().call(x) + keras.random.normal(keras.ops.shape(x))


def test_draws_that_depend_on_other_stages_are_refused():
    model = chain(DrawsGlobally(8))
    stages(model, 2, "2")  # in the first stage nothing was drawn before
    with pytest.raises(UsageError, match="without a generator"):
        stages(model, 2, "1")
