"""Rows of tasks: padding, what is cut and counted, the end of a target, labels, and predictions as text."""

import numpy as np
import pytest

from tf_dist.config import Config
from tf_dist.data.records import Record
from tf_dist.data.tokenizer import train_tokenizer
from tf_dist.errors import DataError, UsageError
from tf_dist.tasks.base import Task, next_tokens, padded
from tf_dist.tasks.classify import Classify
from tf_dist.tasks.registry import TASKS, task_of
from tf_dist.tasks.text_to_text import Translate, text_of

BYTE = train_tokenizer("byte", [], 0)
V = BYTE.vocab_size
PAD, SEPARATOR, MASK, END = V, V + 1, V + 2, BYTE.end_of_text


def records(*values):
    return [Record(f"row {row}", None, value) for row, value in enumerate(values, 1)]


def task(**options):
    return task_of(Config(tokenizer="byte", **options))


def codes(text):
    return list(text.encode())


def test_a_text_is_padded_or_cut_at_its_end():
    rows, cut = padded([np.array(ids) for ids in ([1, 2, 3, 4, 5], [], [6, 7, 8], [9])], 3, PAD)
    assert rows.tolist() == [[1, 2, 3], [PAD] * 3, [6, 7, 8], [9, PAD, PAD]]
    assert cut == 2


def test_a_decoder_predicts_each_next_token_and_the_end():
    x, y, cut = next_tokens(
        [np.array([1, 2]), np.array([3, 4, 5]), np.array([], int)], 3, SEPARATOR, END, PAD
    )
    # Behind its end nothing is predicted, so what stands there makes no difference.
    assert x.tolist() == [[SEPARATOR, 1, 2], [SEPARATOR, 3, 4], [SEPARATOR, END, PAD]]
    assert y.tolist() == [[1, 2, END], [3, 4, 5], [END, -1, -1]]
    assert cut == 1, "the end of the second target had no slot"


def test_one_slot_of_a_target():
    x, y, cut = next_tokens([np.array([1, 2])], 1, SEPARATOR, END, PAD)
    assert (x.tolist(), y.tolist(), cut) == ([[SEPARATOR]], [[1]], 2)


def test_classify_has_one_class_of_each_text():
    labels = ["no", "yes"]
    rows = task(task="classify", seq_len=4).encode(
        records({"text": "ab", "label": "yes"}, {"text": "longer", "label": "no"}), BYTE, labels
    )
    assert rows.x_NxW.tolist() == [[*codes("ab"), PAD, PAD], codes("long")]
    assert rows.y_NxU.tolist() == [[1], [0]]
    assert (rows.x_NxW.dtype, rows.y_NxU.dtype) == (np.int32, np.int32)
    assert rows.cut == {"source": 2, "target": 0}


def test_a_label_that_training_has_not_is_refused_with_its_row():
    values = {"text": "a", "label": "yes"}, {"text": "b", "label": "maybe"}
    with pytest.raises(DataError, match=r"row 2: .*'maybe'.*: no, yes"):
        task(task="classify").encode(records(*values), BYTE, ["no", "yes"])


@pytest.mark.parametrize("architecture", ["encoder-decoder", "prefix-decoder"])
def test_translate_has_source_and_target_in_one_row(architecture):
    done = task(task="translate", source_len=3, target_len=4, architecture=architecture).encode(
        records({"source": "a", "target": "bc"}, {"source": "defg", "target": "hijkl"}), BYTE, []
    )
    assert done.x_NxW.tolist() == [
        [*codes("a"), PAD, PAD, SEPARATOR, *codes("bc"), END],
        [*codes("def"), SEPARATOR, *codes("hij")],
    ]
    assert done.y_NxU.tolist() == [[*codes("bc"), END, -1], codes("hijk")]
    assert done.cut == {"source": 1, "target": 2}


def answered(values, **options):
    given = {"context": "to be or not to be", "question": "?", "answer": "to be", **values}
    made = task(task="answer", seq_len=24, **options)
    return made.encode(records(given), BYTE, []).y_NxU.tolist()[0]


def test_an_answer_begins_where_its_row_says_else_where_it_first_occurs():
    at = 2  # behind the question and the separator
    assert answered({}) == [at, at + 4]
    assert answered({"start": "13"}, start_column="at") == [at + 12, at + 17], "with the space of its word"
    assert answered({"start": "12", "answer": " to be "}, start_column="at") == [at + 12, at + 17]
    for start, said in (("12", "not at character 12"), ("99", "not at character 99"), ("-1", "no number")):
        with pytest.raises(DataError, match=f"row 1: .*{said}"):
            answered({"start": start}, start_column="at")
    with pytest.raises(DataError, match="not in the context"):
        answered({"answer": "or be"})
    assert task(task="answer", start_column="at").columns()["start"] == "at"
    assert "start" not in task(task="answer").columns()


def test_lengths_are_those_of_the_windows_unless_they_are_given():
    layout = task(task="translate", seq_len=9, target_len=4).layout(V)
    assert (layout.source.count, layout.target.count, layout.words) == (9, 4, 13)
    assert (layout.pad, layout.separator, layout.mask, layout.vocab_size) == (PAD, SEPARATOR, MASK, V + 3)
    assert task(task="classify", seq_len=9).layout(V).words == 9
    # Its rows are windows of text, whatever slots a table would have.
    assert task(task="masked-lm", seq_len=9, source_len=4).layout(V).words == 9


def test_a_prediction_ends_at_its_first_end_of_text():
    ids = np.array([*codes("hi"), END, *codes("no"), END])
    assert text_of(ids, BYTE) == "hi"
    assert text_of(np.array([PAD, *codes("hi"), SEPARATOR, MASK, -1]), BYTE) == "hi"
    assert text_of(np.array([END]), BYTE) == text_of(np.full(3, -1), BYTE) == ""


def test_predictions_are_what_references_are():
    classify, translate = task(task="classify"), task(task="translate")
    (row,) = records({"text": "a", "label": "yes", "source": "a", "target": "yes"})
    assert classify.decode(np.array([[1]]), BYTE, ["no", "yes"], [row.values]) == [
        classify.reference_of(row.values)
    ]
    assert translate.decode(np.array([[*codes("yes"), END]]), BYTE, [], [row.values]) == [
        translate.reference_of(row.values)
    ]


def test_a_tokenizer_learns_no_labels():
    (row,) = records({"text": "a", "label": "b", "source": "c", "target": "d"})
    assert task(task="classify").texts(row) == ["a"]
    (row,) = records({"source": "c", "target": "d"})
    assert task(task="translate").texts(row) == ["c", "d"]


# Which task ------------------------------------------------------------------------------------------


class Sentiment(Classify):
    """A user's task."""

    architectures = ("encoder", "decoder")


class Bare(Task):
    """Declares nothing."""


class OddRole(Translate):
    roles = ("source", "mood")


@pytest.mark.parametrize("name", TASKS)
def test_every_task_builds_what_it_declares(name):
    made = task(task=name)
    assert type(made) is TASKS[name]
    assert made.architecture == made.architectures[0]
    assert set(made.columns()) == set(made.roles)
    assert made.head(3).kind in ("tokens", "classes", "spans", "frames")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "classify", "architecture": "encoder-decoder"}, "encoder-decoder.*classify.*encoder"),
        ({"task": "masked-lm", "architecture": "decoder"}, "decoder.*masked-lm.*encoder"),
        ({"task": "translate", "architecture": "encoder"}, "encoder-decoder or prefix-decoder"),
        ({"task": "classify", "sequence_parallel": 2}, "--sequence-parallel 2.*classify"),
        ({"task": "masked-lm", "sequence_parallel": 2}, "--sequence-parallel 2.*masked-lm"),
        ({"task": "no_such_module:Task"}, "--task no_such_module:Task"),
        ({"task": f"{__name__}:nothing"}, "nothing"),
        ({"task": f"{__name__}:records"}, "no class derived from"),
        ({"task": f"{__name__}:Record"}, "no class derived from"),
        ({"task": f"{__name__}:Bare"}, "has no name, roles, architectures"),
    ],
)
def test_what_does_not_fit_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        task(**options)


def test_an_unknown_task_is_refused_with_what_was_meant():
    with pytest.raises(UsageError, match=r"'clasify'.*Did you mean 'classify'"):
        Config(task="clasify").check()


def test_a_users_task():
    made = task(task=f"{__name__}:Sentiment", architecture="decoder", label_column="mood")
    assert type(made).__name__ == "Sentiment"
    assert made.columns() == {"text": "text", "label": "mood"}


def test_a_role_without_an_option_is_refused():
    with pytest.raises(UsageError, match=r"role 'mood' is none of .*source"):
        OddRole(Config(task=f"{__name__}:OddRole")).columns()
