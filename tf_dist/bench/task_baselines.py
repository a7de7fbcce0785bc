"""What a task's figure is compared with: a baseline of each task, on the same split.

All take the rows of both sides of the split, cells by role, and return predictions for the held-out ones.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from tf_dist.data.records import Record
from tf_dist.errors import BackendMissing

Predictions = list[str]
Baseline = Callable[[Sequence[Record], Sequence[Record]], Predictions]
WORD = re.compile(r"\w+|[^\w\s]")
LEAD_WORDS = 12
# A sentence, or a line of a manual page.
SENTENCE = re.compile(r"[^.\n]+")


def linear(train: Sequence[Record], held_out: Sequence[Record]) -> Predictions:
    """TF-IDF of words and pairs of words, and logistic regression (scikit-learn).

    Raises:
        BackendMissing: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise BackendMissing(
            "this baseline needs scikit-learn: pip install 'tf_dist[bench-tasks]'"
        ) from error
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    x = vectorizer.fit_transform(record.values["text"] for record in train)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(x, [record.values["label"] for record in train])
    return list(model.predict(vectorizer.transform(record.values["text"] for record in held_out)))


def commonest(role: str) -> Baseline:
    """The commonest text or label of training, for every row."""

    def predict(train: Sequence[Record], held_out: Sequence[Record]) -> Predictions:
        most = Counter(record.values[role] for record in train).most_common(1)[0][0]
        return [most] * len(held_out)

    return predict


def copied(train: Sequence[Record], held_out: Sequence[Record]) -> Predictions:
    """The source itself."""
    return [record.values["source"] for record in held_out]


def lead(train: Sequence[Record], held_out: Sequence[Record]) -> Predictions:
    """The first words of the source."""
    return [" ".join(record.values["source"].split()[:LEAD_WORDS]) for record in held_out]


def word_table(train: Sequence[Record], held_out: Sequence[Record]) -> Predictions:
    """Word for word, by the target word that goes best with each source word (Dice's coefficient)."""
    table = _table(train)
    return [
        " ".join(table.get(word, word) for word in WORD.findall(record.values["source"]))
        for record in held_out
    ]


def _table(train: Sequence[Record]) -> dict[str, str]:
    sources, targets = Counter[str](), Counter[str]()
    both: dict[str, Counter[str]] = defaultdict(Counter)
    for record in train:
        here, there = (set(WORD.findall(record.values[role])) for role in ("source", "target"))
        sources.update(here)
        targets.update(there)
        for word in here:
            both[word].update(there)
    return {
        word: max(found, key=lambda other: (2 * found[other] / (sources[word] + targets[other]), other))
        for word, found in both.items()
    }


def overlapping(train: Sequence[Record], held_out: Sequence[Record]) -> Predictions:
    """The sentence of the context that shares most words with the question."""
    return [_best_sentence(record.values["context"], record.values["question"]) for record in held_out]


def _best_sentence(context: str, question: str) -> str:
    asked = set(WORD.findall(question.lower()))
    sentences = [found.strip() for found in SENTENCE.findall(context) if found.strip()]
    return max(sentences, key=lambda one: len(asked & set(WORD.findall(one.lower()))), default="")
