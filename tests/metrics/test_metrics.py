"""Metrics of tasks against hand-computed values, their laws, and the registry of their names."""

import math
import random
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.errors import BackendMissing, DataError, UsageError
from tf_dist.metrics import METRICS, compute, named_metrics
from tf_dist.metrics.answers import exact_match, token_f1
from tf_dist.metrics.classification import accuracy, macro_f1
from tf_dist.metrics.perplexity import perplexity, pseudo_perplexity
from tf_dist.metrics.rouge import longest_common_subsequence, rouge_l
from tf_dist.metrics.words import answer_words, words

TEXTS = ["the cat sat on the mat today", "ein kleiner Hund läuft durch den Wald", "one two three four five"]
CHINESE = ["今天天气很好。", "我们去公园吧。"]
LABELS = ["a", "b", "a", "c"]
LOSSES = [0.0, 0.0, 0.0]


def perfect(metric):
    """Predictions without a mistake, and their references."""
    if metric.takes == "losses":
        return LOSSES, [3, 1, 2]
    if metric.name == "bleu_zh":
        return CHINESE, CHINESE
    lists = LABELS if metric.takes == "labels" else TEXTS
    return lists, lists


def installed(metric):
    if metric.package:
        pytest.importorskip(metric.package)
    return metric


every_metric = pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)


# All metrics ---------------------------------------------------------------------------------------


@every_metric
def test_perfect_predictions_have_the_best_value(metric):
    assert installed(metric).function(*perfect(metric)) == pytest.approx(metric.best, abs=1e-9)


@every_metric
def test_worse_predictions_are_worse(metric):
    predictions, references = perfect(installed(metric))
    worse = [1.0, *predictions[1:]] if metric.takes == "losses" else [predictions[-1], *predictions[1:]]
    value = metric.function(worse, references)
    assert value < metric.best if metric.higher_is_better else value > metric.best


@every_metric
def test_the_order_of_rows_does_not_matter(metric):
    predictions, references = perfect(installed(metric))
    predictions = [0.1, 0.7, 0.3] if metric.takes == "losses" else [*predictions[1:], predictions[0]]
    pairs = list(zip(predictions, references, strict=True)) * 7
    before = metric.function(*map(list, zip(*pairs, strict=True)))
    random.Random(1).shuffle(pairs)
    assert metric.function(*map(list, zip(*pairs, strict=True))) == before


@every_metric
def test_no_rows_is_an_error(metric):
    with pytest.raises(DataError, match="no rows"):
        metric.function([], [])


@every_metric
def test_lists_of_unequal_length_are_an_error(metric):
    predictions, references = perfect(metric)
    with pytest.raises(DataError, match=f"{len(predictions) - 1} predictions and {len(references)} ref"):
        metric.function(predictions[1:], references)


@pytest.mark.parametrize("metric", [one for one in METRICS.values() if one.package], ids=lambda one: one.name)
def test_a_missing_library_is_said(metric, monkeypatch):
    monkeypatch.setitem(sys.modules, metric.package, None)  # importing it raises ImportError
    with pytest.raises(BackendMissing, match=rf"{metric.package}: pip install 'tf_dist\[tasks\]'"):
        metric.function(*perfect(metric))
    with pytest.raises(BackendMissing):
        named_metrics([metric.name])


@pytest.mark.parametrize(
    "metric", [one for one in METRICS.values() if one.takes == "texts"], ids=lambda m: m.name
)
def test_predictions_may_be_empty(metric):
    predictions, references = perfect(installed(metric))
    value = metric.function([""] * len(predictions), references)
    assert value == (0 if metric.higher_is_better else 1)


# Labels --------------------------------------------------------------------------------------------


def test_accuracy():
    assert accuracy([1, 2, 3, 3], [1, 2, 2, 3]) == 0.75


def test_macro_f1_by_hand():
    # a: TP 1, predicted 2, right 1 -> 2/3. b: TP 1, predicted 1, right 2 -> 2/3. c: predicted only -> 0.
    assert macro_f1(["a", "a", "b", "c"], ["a", "b", "b", "b"]) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40))
def test_macro_f1_is_that_of_scikit_learn(pairs):
    metrics = pytest.importorskip("sklearn.metrics")
    predictions, references = map(list, zip(*pairs, strict=True))
    expected = metrics.f1_score(references, predictions, average="macro", zero_division=0)
    assert macro_f1(predictions, references) == pytest.approx(expected, abs=1e-12)


# Perplexity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [perplexity, pseudo_perplexity])
def test_perplexity_is_a_mean_over_tokens(function):
    # Two tokens of probability 1/2, six of 1/8: a mean of rows would give 4.
    assert function([2 * math.log(2), 6 * math.log(8)], [2, 6]) == pytest.approx(2 ** (20 / 8))
    assert function([1e6], [1]) == math.inf == function([math.inf, 1.0], [1, 1])
    assert math.isnan(function([math.nan], [1]))
    with pytest.raises(DataError, match="no tokens"):
        function([0.0], [0])


# Texts ---------------------------------------------------------------------------------------------


def test_words_of_many_languages():
    assert words("The cat's 2nd_hat!") == ["the", "cat", "s", "2nd", "hat"]
    assert words("Äpfel, naïve") == ["äpfel", "naïve"] == words("A\u0308pfel, nai\u0308ve")
    assert words("我有 2 只猫 cats") == ["我", "有", "2", "只", "猫", "cats"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]  # vowel signs are marks, not letters
    assert words("コーヒー") == list("コーヒー")
    assert words(" .,! ") == []


def test_answers_are_normalized_as_squad_does():
    assert answer_words("The  Cat's (big) hat.") == ["cats", "big", "hat"]
    assert answer_words("«Straße»、北京。") == ["straße", "北", "京"]
    assert answer_words("a $5 an") == ["5"]


def test_exact_match_and_f1_by_hand():
    predictions = ["The cat!", "a big dog", "", "the"]
    references = ["cat", "big black dog", "x", ""]
    assert exact_match(predictions, references) == 2 / 4  # the first; the last has no words on both sides
    assert token_f1(predictions, references) == pytest.approx((1 + 2 * 2 / (2 + 3) + 0 + 1) / 4)
    assert token_f1(["x x y"], ["x y y"]) == pytest.approx(2 / 3)  # counted as often as they occur


def test_rouge_l_by_hand():
    # Lin (2004), section 3.1.
    reference = "police killed the gunman"
    assert rouge_l(["the gunman kill police"], [reference]) == pytest.approx(2 / 4)
    assert rouge_l(["police kill the gunman"], [reference]) == pytest.approx(3 / 4)
    assert rouge_l(["", "police"], ["", reference]) == pytest.approx((0 + 2 / 5) / 2)


def plain_lcs(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            same = table[i][j] + 1 if one == other else 0
            table[i + 1][j + 1] = max(same, table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text("abc", max_size=30), st.text("abcd", max_size=80))
def test_longest_common_subsequence_is_that_of_the_plain_algorithm(first, second):
    assert longest_common_subsequence(list(first), list(second)) == plain_lcs(first, second)


@given(st.text("ab c.A1_-", max_size=40), st.text("ab c.A1_-", max_size=40))
def test_rouge_l_of_english_is_that_of_googles_package(predicted, right):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    expected = scorer.score(right, predicted)["rougeL"].fmeasure
    assert rouge_l([predicted], [right]) == pytest.approx(expected, abs=1e-12)


def test_bleu_by_hand():
    pytest.importorskip("sacrebleu")
    # 4, 3, 2 and 1 of 5, 4, 3, 2 n-grams match; equal lengths, so no brevity penalty.
    value = METRICS["bleu"].function(["a b c d x"], ["a b c d e"])
    assert value == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    assert METRICS["bleu"].function(["one two"], ["one two"]) == 0  # documented: no 4-gram anywhere
    assert METRICS["bleu"].signature().startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "tok:zh" in METRICS["bleu_zh"].signature()


def test_bleu_of_chinese_needs_its_tokenizer():
    pytest.importorskip("sacrebleu")
    predictions = ["今天天气很坏。", "我们去公园吧。"]
    assert METRICS["bleu_zh"].function(predictions, CHINESE) > 50
    assert METRICS["bleu"].function(predictions, CHINESE) < 50


def test_chrf_by_hand():
    pytest.importorskip("sacrebleu")
    # "ab" and "ac": of 1-grams 1 of 2 match, of 2-grams none: precision = recall = (1/2 + 0) / 2.
    assert METRICS["chrf"].function(["ab"], ["ac"]) == pytest.approx(25)
    assert METRICS["chrf"].signature().startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_error_rates_by_hand():
    pytest.importorskip("jiwer")
    wer, cer = METRICS["wer"].function, METRICS["cer"].function
    # A substitution, a deletion, and two insertions, of 4 + 0 words: one mean over all rows.
    assert wer(["the cat mat", "uh oh"], ["the dog on\tmat", ""]) == 4 / 4
    assert cer(["abd ", "x"], ["abc", "xy"]) == 2 / 5
    assert cer(["a  b"], ["a b"]) == 0
    for function in (wer, cer):
        with pytest.raises(DataError, match="all 2 references are empty"):
            function(["a", ""], ["", " "])


# Names ---------------------------------------------------------------------------------------------


def test_keys_of_metrics_jsonl():
    keys = {metric.key for metric in METRICS.values()}
    contract = "accuracy macro_f1 bleu chrf rouge_l exact_match f1 wer cer"
    assert keys == {f"val_{name}" for name in contract.split()} | {"perplexity", "val_pseudo_perplexity"}


def test_a_task_declares_names():
    metrics = named_metrics(["accuracy", "macro_f1", "accuracy"])
    assert [metric.name for metric in metrics] == ["accuracy", "macro_f1"]
    assert compute(metrics, ["x", "y"], ["x", "z"]) == {"val_accuracy": 0.5, "val_macro_f1": 1 / 3}


def test_names_that_cannot_be():
    with pytest.raises(UsageError, match=r"no metric 'macro-f1'.*Did you mean 'macro_f1'"):
        named_metrics(["macro-f1"])
    pytest.importorskip("sacrebleu")
    with pytest.raises(UsageError, match="bleu and bleu_zh both write val_bleu"):
        named_metrics(["bleu", "bleu_zh"])
