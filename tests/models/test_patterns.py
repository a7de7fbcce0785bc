"""Weights chosen by patterns, without a model."""

import pytest

from tf_dist.errors import UsageError
from tf_dist.models.patterns import chosen, names_in

PATHS = [
    "embedding/embeddings",
    "layer_0_attention/query_key_value/kernel",
    "layer_0_attention/query_key_value/bias",
    "layer_1_feed_forward_in/kernel",
    "layer_10_feed_forward_in/kernel",
    "final_norm/gamma",
]


@pytest.mark.parametrize(
    ("patterns", "wanted"),
    [
        ("embedding", [0]),
        ("layer_[01]_*,embedding", [0, 1, 2, 3]),
        ("layer_0_attention/query_key_value", [1, 2]),
        ("query_key_value", [1, 2]),
        ("kernel", [1, 3, 4]),
        ("*/kernel", [1, 3, 4]),
        ("layer_1*", [3, 4]),
        ("*", [0, 1, 2, 3, 4, 5]),
        ("*, !final_norm ,", [0, 1, 2, 3, 4]),
        ("*,!layer_*,bias", [0, 2, 5]),
        ("!final_norm,*", [0, 1, 2, 3, 4, 5]),
        ("", []),
    ],
)
def test_what_a_pattern_chooses(patterns, wanted):
    assert chosen(PATHS, patterns, "--freeze") == wanted


@pytest.mark.parametrize(
    "patterns", ["layer_2_*", "Embedding", "embedding,layer_0", "*,!head", "layer_0_attention/*/x"]
)
def test_a_pattern_that_matches_nothing_is_an_error(patterns):
    with pytest.raises(
        UsageError, match=r"--freeze '.*' matches no weight of this model\. Its layers are embedding"
    ):
        chosen(PATHS, patterns, "--freeze")


def test_the_nearest_layer_is_named():
    with pytest.raises(UsageError, match="Did you mean 'final_norm'"):
        chosen(PATHS, "finalnorm", "--freeze")


def test_names_in_a_path():
    assert names_in("a/b/kernel") == ["a", "a/b", "a/b/kernel", "a", "b", "kernel"]
