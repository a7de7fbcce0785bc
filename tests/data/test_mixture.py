"""Mixtures of corpora: shares, order, repetition, tokens and their folder."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.data.documents import PackedRows
from tf_dist.data.mixture import (
    Mixture,
    MixturePart,
    MixtureRows,
    MixtureSampler,
    RowsOfPart,
    mixture_of,
    sampler_of,
    with_weights,
)
from tf_dist.data.prepare import prepare
from tf_dist.data.prepared_dataset import files_changed, find_prepared, open_prepared
from tf_dist.data.sampler import Sampler
from tf_dist.errors import DataError, UsageError

# The command line ------------------------------------------------------------------------------------


def test_weights_are_read_and_normalized():
    assert with_weights(["a.jsonl:0.7", "b/:.3"]) == (("a.jsonl", "b/"), (0.7, 0.3))
    sources, weights = with_weights(["x:1", "stdlib:3", "books/*.txt:4e0"])
    assert sources == ("x", "stdlib", "books/*.txt") and weights == (0.125, 0.375, 0.5)


def test_without_weights_nothing_changes():
    for values in (["a", "b"], ["stdlib"], ["a:b", "c:1.2.3"], ["a:nan"]):
        assert with_weights(values) == (tuple(values), ())


def test_a_file_that_is_named_so_wins(tmp_path):
    path = tmp_path / "notes:0.5"
    path.write_text("text")
    assert with_weights([str(path)]) == ((str(path),), ())
    assert with_weights([str(tmp_path / "*:0.5")]) == ((str(tmp_path / "*:0.5"),), ())
    assert with_weights([f"{path}:2"]) == ((str(path),), (1.0,))


@pytest.mark.parametrize("values", [["a:0.5", "b"], ["a", "b:1"], ["a:0"], ["a:-1", "b:1"], ["a:1e999"]])
def test_weights_that_are_none_are_refused(values):
    with pytest.raises(UsageError, match="weight"):
        with_weights(values)


# The order -------------------------------------------------------------------------------------------


def mixture(weights, rows):
    firsts = np.cumsum([0, *rows])
    names = [f"c{i}" for i in range(len(weights))]
    return Mixture([MixturePart(*one) for one in zip(names, weights, firsts, rows, strict=False)])


WEIGHTS = st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=5)


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 1 << 36))
def test_each_row_is_of_one_corpus_and_counts_are_those_of_the_rows(weights, first):
    mixed = mixture(weights, [10] * len(weights))
    rows = np.arange(first, first + 300)
    drawn = mixed.drawn(rows)
    assert (np.sum([own for own, _ in drawn], axis=0) == 1).all()
    for place, (own, before) in enumerate(drawn):
        wanted = mixed.counts(first)[place] + np.cumsum(own) - own
        np.testing.assert_array_equal(before, wanted)
    assert sum(mixed.counts(first)) == first


@settings(deadline=None)
@given(WEIGHTS, st.integers(0, 10_000))
def test_every_stretch_of_rows_has_the_shares(weights, first):
    mixed = mixture(weights, [10] * len(weights))
    before = np.array(mixed.counts(first))
    for length in (1, 8, 32, 1000):
        shares = np.array([part.weight for part in mixed.parts])
        taken = np.array(mixed.counts(first + length)) - before
        assert np.abs(taken - shares * length).max() <= 2.5


def test_a_corpus_is_read_as_a_whole_then_again_in_another_order():
    mixed = mixture([0.75, 0.25], [50, 7])
    sampler = MixtureSampler(mixed, 8, seed=3)
    order = np.concatenate([sampler.batch(step) for step in range(50)])
    small = order[order >= 50]
    passes = [small[at : at + 7] for at in range(0, 98, 7)]
    assert len(small) == 100 and all(sorted(one) == list(range(50, 57)) for one in passes)
    assert len({tuple(one) for one in passes}) > 10
    large = order[order < 50]
    assert sorted(large[:50]) == list(range(50)) and (large[:50] != large[50:100]).any()
    assert mixed.passes(400) == {"c0": 300 / 50, "c1": 100 / 7}


def test_batches_are_full_also_over_the_end_of_an_epoch():
    mixed = mixture([1, 2], [9, 4])
    sampler = MixtureSampler(mixed, 5, seed=1)
    assert sampler.steps_per_epoch == 3 and sampler.epoch(3) == 1
    assert all((sampler.batch(step) >= 0).all() for step in range(9))


def test_any_step_can_be_computed_first():
    """As after a resume, or on a rank that joins later; blocks of steps do not matter."""
    mixed = mixture([0.6, 0.3, 0.1], [400, 30, 11])
    one_by_one = MixtureSampler(mixed, 6, seed=5)
    wanted = [one_by_one.batch(step) for step in range(200)]
    for step in (199, 0, 74, 73, 150):
        np.testing.assert_array_equal(MixtureSampler(mixed, 6, seed=5).batch(step), wanted[step])
    other = MixtureSampler(mixed, 6, seed=6)
    assert any((other.batch(step) != wanted[step]).any() for step in range(5))
    # The same rows, cut into batches of another size.
    halves = MixtureSampler(mixed, 3, seed=5)
    epoch = one_by_one.steps_per_epoch
    found = np.concatenate([halves.batch(step) for step in range(2 * epoch - 2)])
    np.testing.assert_array_equal(found, np.concatenate(wanted)[: len(found)])


# Rows ------------------------------------------------------------------------------------------------


def mixed_rows():
    tokens = np.concatenate([np.arange(10), 100 + np.arange(6), 200 + np.arange(1)]).astype(np.uint16)
    return MixtureRows(tokens, 4, [("a", 0.5, 10), ("b", 0.3, 6), ("c", 0.2, 1)])


def test_no_window_has_tokens_of_two_corpora():
    rows = mixed_rows()
    assert len(rows) == 3 + 2
    x, y = rows.rows([0, 2, 3, 4, -1])
    assert x.tolist() == [[0, 1, 2, 3], [8, 0, 0, 0], [100, 101, 102, 103], [104, 0, 0, 0], [0] * 4]
    assert y.tolist() == [[1, 2, 3, 4], [9, -1, -1, -1], [101, 102, 103, 104], [105, -1, -1, -1], [-1] * 4]
    with pytest.raises(IndexError):
        rows.rows([5])
    part = RowsOfPart(rows, rows.mixture.parts[1])
    assert len(part) == 2 and part.rows([1, -1])[0].tolist() == [[104, 0, 0, 0], [0] * 4]
    with pytest.raises(DataError):
        rows.must_be_below(105)


def test_rows_that_are_changed_on_their_way_are_of_the_mixture():
    rows = PackedRows(mixed_rows(), end=9)
    assert mixture_of(rows) is not None
    with pytest.raises(DataError, match="corpus c"):
        sampler_of(rows, 2, seed=1)
    assert type(sampler_of(RowsOfPart(rows, rows.mixture.parts[0]), 2, seed=1)) is Sampler


def test_the_end_of_a_document_has_no_target():
    x, y = PackedRows(mixed_rows(), end=2).rows([0, 3])
    assert x[0].tolist() == [0, 1, 2, 3] and y.tolist() == [[1, 2, -1, 4], [101, 102, 103, 104]]


# On disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def corpora(tmp_path):
    lines = [json.dumps({"text": f"number {i} of many"}) for i in range(40)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    (tmp_path / "one.txt").write_text("a single long document. " * 20)
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.md").write_text(f"# file {i}\n" * 9)
    return [str(tmp_path / name) for name in ("many.jsonl", "one.txt", "many")]


def made(corpora, tmp_path, weights, **options):
    return prepare(corpora, tokenizer="byte", folder=tmp_path / "prepared", weights=weights, **options)


def test_a_mixture_is_prepared_and_found_again(corpora, tmp_path):
    found = made(corpora, tmp_path, (0.5, 0.3, 0.2))
    parts = found.meta["mixture"]
    assert [one["name"] for one in parts] == ["many", "one", "many-2"]
    assert [one["split"] for one in parts] == ["document", "position", "document"]
    for side in ("train", "val"):
        assert sum(one["tokens"][side] for one in parts) == found.meta["tokens"][side]
        assert all(one["tokens"][side] > 0 for one in parts)
        alone = [prepare([one], tokenizer="byte", folder=tmp_path / "alone") for one in corpora]
        wanted = np.concatenate([getattr(one, side) for one in alone])
        np.testing.assert_array_equal(getattr(found, side), wanted)  # as each corpus is by itself
    assert made(corpora, tmp_path, (0.5, 0.3, 0.2)).path == found.path
    rows = found.rows("train", 16)
    assert [part.weight for part in rows.mixture.parts] == pytest.approx([0.5, 0.3, 0.2])
    found.verify()
    assert not files_changed(found, 0)


def test_other_weights_are_other_content(corpora, tmp_path):
    first, other = made(corpora, tmp_path, (0.5, 0.3, 0.2)), made(corpora, tmp_path, (0.2, 0.3, 0.5))
    plain = made(corpora, tmp_path, ())
    assert len({one.path for one in (first, other, plain)}) == 3
    assert first.meta["sample_sha256"] == other.meta["sample_sha256"]
    assert first.meta["content_sha256"] != other.meta["content_sha256"]
    tokenizer = first.meta["tokenizer_sha256"]
    for one in (first, other):
        assert find_prepared(tmp_path / "prepared", one.meta["content_sha256"], tokenizer).path == one.path
    assert "mixture" not in plain.meta


def test_a_changed_mixture_is_noticed(corpora, tmp_path):
    found = made(corpora, tmp_path, (0.5, 0.3, 0.2))
    meta = json.loads((found.path / "meta.json").read_text())
    meta["mixture"][0]["weight"] = 0.6
    (found.path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="changed"):
        open_prepared(found.path).verify()
    meta["mixture"][0]["tokens"]["train"] += 1
    (found.path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="damaged"):
        open_prepared(found.path)


def test_the_tokenizer_is_trained_in_proportion(tmp_path):
    """Of equal text but unequal weights, the words of the heavier corpus become tokens first."""
    for name in ("alpha", "omega"):
        (tmp_path / f"{name}.txt").write_text((f"{name}{name} " * 20 + "\n") * 400)
    sources = [str(tmp_path / "alpha.txt"), str(tmp_path / "omega.txt")]

    def tokens_of(weights, word):
        options = {"tokenizer": "bpe", "vocab_size": 264, "folder": tmp_path / "prepared"}
        return len(prepare(sources, weights=weights, **options).tokenizer.encode(f" {word}{word}"))

    assert tokens_of((0.95, 0.05), "alpha") < tokens_of((0.05, 0.95), "alpha")
    assert tokens_of((0.05, 0.95), "omega") < tokens_of((0.95, 0.05), "omega")
