"""Metrics by name: what a task declares, and the keys of ``metrics.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tf_dist.errors import UsageError
from tf_dist.metrics.answers import exact_match, token_f1
from tf_dist.metrics.classification import accuracy, macro_f1
from tf_dist.metrics.pairs import library
from tf_dist.metrics.perplexity import perplexity, pseudo_perplexity
from tf_dist.metrics.rouge import rouge_l
from tf_dist.metrics.speech import cer, wer
from tf_dist.metrics.translation import bleu, bleu_signature, bleu_zh, chrf, chrf_signature
from tf_dist.spelling import did_you_mean


@dataclass(frozen=True)
class Metric:
    """A metric that tasks can declare.

    name: by which a task declares it.
    key: in ``metrics.jsonl``.
    function: of (predictions, references), lists in row order, to a number. If ``takes`` is ``losses``, of
        (sums of -log p in nats, numbers of tokens).
    takes: what the lists hold.
    best: the value of perfect predictions. BLEU and chrF are 0 to 100, other shares 0 to 1.
    higher_is_better: which way is up, for ``--early-stop`` and its like.
    package: what has to be installed (extra ``tasks``); empty if nothing.
    signature: settings and version of the library, to publish with the value; None if the docstring of
        ``function`` says it all.
    """

    name: str
    key: str
    function: Callable[[Any, Any], float]
    takes: Literal["labels", "texts", "losses"]
    best: float
    higher_is_better: bool = True
    package: str = ""
    signature: Callable[[], str] | None = None

    def check_installed(self) -> None:
        """Raise `BackendMissing` where the package of this metric is not installed, or does not load."""
        if self.package:
            library(self.package, self.name)


_ALL = (
    Metric("accuracy", "val_accuracy", accuracy, "labels", 1),
    Metric("macro_f1", "val_macro_f1", macro_f1, "labels", 1),
    # The key that validation of language models has always had.
    Metric("perplexity", "perplexity", perplexity, "losses", 1, higher_is_better=False),
    Metric(
        "pseudo_perplexity", "val_pseudo_perplexity", pseudo_perplexity, "losses", 1, higher_is_better=False
    ),
    Metric("bleu", "val_bleu", bleu, "texts", 100, package="sacrebleu", signature=bleu_signature),
    Metric(
        "bleu_zh",
        "val_bleu",
        bleu_zh,
        "texts",
        100,
        package="sacrebleu",
        signature=lambda: bleu_signature("zh"),
    ),
    Metric("chrf", "val_chrf", chrf, "texts", 100, package="sacrebleu", signature=chrf_signature),
    Metric("rouge_l", "val_rouge_l", rouge_l, "texts", 1),
    Metric("exact_match", "val_exact_match", exact_match, "texts", 1),
    Metric("f1", "val_f1", token_f1, "texts", 1),
    Metric("wer", "val_wer", wer, "texts", 0, higher_is_better=False, package="jiwer"),
    Metric("cer", "val_cer", cer, "texts", 0, higher_is_better=False, package="jiwer"),
)
METRICS = {metric.name: metric for metric in _ALL}


def named_metrics(names: Iterable[str]) -> list[Metric]:
    """The metrics of these names; call it before training starts, so that nothing is missing after an epoch.

    Raises:
        UsageError: no metric has that name, or two of them have one key; on every rank that calls.
        BackendMissing: a package is not installed.
    """
    found: dict[str, Metric] = {}
    for name in names:
        if name not in METRICS:
            known = ", ".join(METRICS)
            raise UsageError(f"no metric {name!r}; there are {known}{did_you_mean(name, list(METRICS))}")
        metric = METRICS[name]
        other = found.setdefault(metric.key, metric)
        if other is not metric:
            raise UsageError(f"metrics {other.name} and {name} both write {metric.key}: choose one")
        metric.check_installed()
    return list(found.values())


def compute(
    metrics: Iterable[Metric], predictions: Sequence[Any], references: Sequence[Any]
) -> dict[str, float]:
    """Values of metrics that take the same lists, by their keys in ``metrics.jsonl``.

    Raises:
        DataError: no rows, lists of unequal length, or a metric is undefined for them.
        BackendMissing: a package is not installed.
    """
    return {metric.key: metric.function(predictions, references) for metric in metrics}
