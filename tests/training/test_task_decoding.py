"""Decoding of rows with a cache writes what the model writes without one, for every architecture."""

import keras
import numpy as np
import pytest

from tf_dist.decoding.beam_search import BeamSearch
from tf_dist.models import row_lstms, row_transformers
from tf_dist.models.body_sizes import BodySizes
from tf_dist.models.row_layout import Head, RowLayout, Slots
from tf_dist.parallel.buckets import BucketOverlap
from tf_dist.parallel.reduction_tree import BlockSum
from tf_dist.runners.replica import Replica
from tf_dist.runners.runner import WholeRunner
from tf_dist.training.predictions import Decoder, greedy

V, S, T, END = 13, 5, 7, 12
TEXT = RowLayout(Slots(S), Slots(T), V)
IMAGE = RowLayout(Slots(4, 6), Slots(T), V)


def pointing(build):
    """A model that also copies tokens of its source."""
    return lambda layout, sizes, head: build(layout, sizes, Head(head.kind, points=True))


KINDS = [
    (row_transformers.encoder_decoder, TEXT),
    (row_transformers.prefix_decoder, TEXT),
    (row_transformers.encoder_decoder, IMAGE),
    (row_transformers.prefix_decoder, IMAGE),
    (row_lstms.encoder_decoder, TEXT),
    (row_lstms.prefix_decoder, TEXT),
    (row_lstms.encoder_decoder, IMAGE),
    (pointing(row_transformers.encoder_decoder), TEXT),
    (pointing(row_transformers.prefix_decoder), TEXT),
    (pointing(row_lstms.encoder_decoder), TEXT),
    (pointing(row_lstms.prefix_decoder), TEXT),
]


def runner_of(build, layout, seed=3):
    keras.utils.set_random_seed(seed)
    model = build(layout, BodySizes(2, 16, 2), Head("tokens"))
    for variable in model.weights:  # else all tokens are as likely
        variable.assign(np.asarray(variable.value) * 8)
    replica = Replica(model, keras.optimizers.SGD(0.1), 4, layout.words, 1)
    sums = BlockSum(replica.parameters, range(1), range(1))
    return WholeRunner(replica, [0], sums, BucketOverlap(None, ""), True)


def rows(layout, count=4):
    rng = np.random.default_rng(2)
    if layout.source.width:
        values = rng.normal(size=(count, layout.source.count * layout.source.width))
        source = values.astype(np.float16).view(np.int32)
    else:
        source = rng.integers(0, V, (count, S)).astype(np.int32)
        source[1, 3:] = layout.pad
    return np.concatenate([source, np.zeros((count, T), np.int32)], axis=1)


@pytest.mark.extended  # by the logits, below
@pytest.mark.parametrize(("build", "layout"), KINDS)
def test_the_cache_changes_no_token(build, layout):
    runner = runner_of(build, layout)
    runner.cached_forward()  # it has one: not refused
    x = rows(layout)
    without = greedy(runner, x, layout, END)
    assert len(np.unique(without)) > 1
    np.testing.assert_array_equal(Decoder(layout, END)(runner, x), without)


@pytest.mark.parametrize(("build", "layout"), KINDS)
def test_cached_logits_are_those_of_the_whole_row(build, layout):
    runner = runner_of(build, layout)
    x = rows(layout)
    x[:, layout.source.words] = layout.separator
    x[:, layout.source.words + 1 :] = np.random.default_rng(3).integers(0, V, (4, T - 1))
    wanted = runner.outputs(x)
    forward = runner.cached_forward()
    state = forward.begin(4, 64)
    first = layout.source.words + 1
    zero, count = np.zeros(4, np.int32), np.full(4, first, np.int32)
    logits, state = forward(x[:, :first], zero, count, state)
    np.testing.assert_allclose(logits, wanted[:, 0], atol=2e-5 * np.abs(wanted).max())
    for t in range(1, T):
        place = np.full(4, layout.source.words + t, np.int32)
        logits, state = forward(x[:, place[0] : place[0] + 1], place, np.ones(4, np.int32), state)
        np.testing.assert_allclose(logits, wanted[:, t], atol=2e-5 * np.abs(wanted).max())


def test_beams_find_what_is_at_least_as_likely():
    runner = runner_of(*KINDS[0])
    x = rows(TEXT)
    found = Decoder(TEXT, END, BeamSearch(3))(runner, x)
    assert found.shape == (4, T)
