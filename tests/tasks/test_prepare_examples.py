"""Tables -> rows on disk: the split, labels, what is found again, and damaged folders."""

import dataclasses
import importlib
import json
import os
import sys

import numpy as np
import pytest

from tf_dist.config import Config
from tf_dist.data.prepared_dataset import open_prepared
from tf_dist.errors import DataError, UsageError
from tf_dist.tasks import prepare as prepare_module
from tf_dist.tasks.prepare import held_out, prepare_examples
from tf_dist.tasks.registry import task_of

LETTERS = "abcd"


def table(folder, rows, name="table.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def classified(count=40, labels=("no", "yes"), text="text"):
    return [{"text": f"{text} {row}", "label": labels[row % len(labels)]} for row in range(count)]


def translated(count=40):
    return [{"source": f"s{row}", "target": f"t{row}"} for row in range(count)]


def run(folder, rows, **options):
    given = {"task": "classify", "tokenizer": "byte", "seq_len": 8, "val_fraction": 0.25, **options}
    config = Config(prepared_dir=str(folder / "prepared"), **given)
    sources = [rows] if isinstance(rows, str) else [table(folder, rows)]
    return prepare_examples(task_of(config), config, sources)


def references(corpus):
    """What predictions for the held-out rows are compared with."""
    role = "label" if corpus.meta["task"] == "classify" else "target"
    return [cells[role] for cells in held_out(corpus)]


def both(corpus, seq_len=8):
    return [corpus.rows(side, seq_len) for side in ("train", "val")]


USERS = """
from tf_dist.tasks.classify import Classify

class Shouted(Classify):
    def sources(self, records, tokenizer):
        loud = [one._replace(values={**one.values, "text": one.values["text"].CASE()}) for one in records]
        return super().sources(loud, tokenizer)
"""


def test_rows_of_other_code_are_other_rows(tmp_path, monkeypatch):
    """A user who changes her task does not go on with what the task before has made."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which is as old and as large for other code
    made, rows = {}, table(tmp_path, classified())
    for case in ("upper", "lower", "upper"):
        (tmp_path / "users_task.py").write_text(USERS.replace("CASE", case))
        importlib.invalidate_caches()
        sys.modules.pop("users_task", None)
        corpus = run(tmp_path, rows, task="users_task:Shouted")
        text = corpus.tokenizer.decode(corpus.rows("train", 8).rows(np.arange(1))[0][0][:4])
        assert text == getattr("text", case)()
        made.setdefault(case, corpus.path)
        assert made[case] == corpus.path
    assert len(set(made.values())) == 2


def test_rows_of_classes(tmp_path, told):
    corpus = run(tmp_path, classified())
    meta, (train, val) = corpus.meta, both(corpus)
    assert (len(train), len(val)) == (30, 10) == (meta["rows"]["train"], meta["rows"]["val"])
    assert meta["labels"] == ["no", "yes"]
    assert (meta["words"], meta["targets"], meta["task"]) == (8, 1, "classify")
    assert meta["counted"] == {"train": 30, "val": 10}
    x, y = val.rows(np.arange(10))
    texts = [corpus.tokenizer.decode(row[row < corpus.tokenizer.vocab_size]) for row in x]
    assert [meta["labels"][place] for place in y[:, 0]] == references(corpus)
    assert references(corpus).count("yes") == 5, "the split is stratified"
    assert [int(text.split()[1]) % 2 == 1 for text in texts] == [one == "yes" for one in references(corpus)]
    assert "30 rows to train on, 10 held out, 2 labels" in told.messages


def test_rows_of_texts(tmp_path):
    corpus = run(tmp_path, translated(), task="translate", source_len=5, target_len=3)
    train, val = both(corpus)
    assert (len(train), len(val), corpus.meta["labels"]) == (30, 10, [])
    x, y = val.rows(np.arange(10))
    assert (x.shape, y.shape) == ((10, 8), (10, 3))
    numbers = [reference[1:] for reference in references(corpus)]
    assert [
        corpus.tokenizer.decode(row[1 : 1 + len(one)]) for row, one in zip(x, numbers, strict=True)
    ] == numbers


def test_tokens_that_were_cut_are_counted_and_said(tmp_path, told):
    rows = [{"source": "12345", "target": "123"}, {"source": "1", "target": "1"}, *translated(10)]
    corpus = run(tmp_path, rows, task="translate", source_len=4, target_len=3)
    assert corpus.meta["cut"] == {"source": 1, "target": 1}
    said = (
        "1 tokens of {0}s were cut off: rows have {1} slots for them. "
        "Raise --{0}-len or --seq-len to keep them"
    )
    assert [one for one in told.messages if "cut off" in one] == [
        said.format("source", 4), said.format("target", 3),
    ]  # fmt: skip


def test_the_split_depends_on_seed_and_content_alone(tmp_path):
    rows = classified()
    held_out = set(map(bytes, run(tmp_path, rows).rows("val", 8).rows(np.arange(10))[0]))
    turned = run(tmp_path, table(tmp_path, rows[::-1], "turned.jsonl"))
    assert set(map(bytes, turned.rows("val", 8).rows(np.arange(10))[0])) == held_out
    other = run(tmp_path, rows, seed=2)
    assert set(map(bytes, other.rows("val", 8).rows(np.arange(10))[0])) != held_out


def test_every_label_is_trained_on_however_rare(tmp_path):
    """So no label can be new in validation, but only in other data."""
    rows = [*classified(30), {"text": "one", "label": "rare"}, {"text": "same", "label": "x"}]
    rows += [{"text": "same", "label": "y"}] * 2
    corpus = run(tmp_path, rows, val_fraction=0.9)
    trained = set(both(corpus)[0].rows(np.arange(corpus.meta["rows"]["train"]))[1][:, 0])
    assert corpus.meta["labels"] == ["no", "rare", "x", "y", "yes"]
    assert trained == set(range(5))


def test_one_batch_or_many_are_the_same_rows(tmp_path, monkeypatch):
    whole = run(tmp_path, classified()).train.tobytes()
    monkeypatch.setattr(prepare_module, "BATCH_ROWS", 7)
    again = run(tmp_path, table(tmp_path, classified(), "again.jsonl"))
    assert again.train.tobytes() == whole


def test_twice_is_once(tmp_path, monkeypatch):
    first = run(tmp_path, classified())
    monkeypatch.setattr(prepare_module, "_write", lambda *_: pytest.fail("prepared again"))
    found = prepare_examples(*given(tmp_path))
    assert found.path == first.path and found.meta == first.meta


def given(folder, **options):
    config = Config(task="classify", tokenizer="byte", seq_len=8, val_fraction=0.25)
    config = dataclasses.replace(config, prepared_dir=str(folder / "prepared"), **options)
    return task_of(config), config, [str(folder / "table.jsonl")]


@pytest.mark.parametrize(
    "options",
    [{"seq_len": 9}, {"source_len": 7}, {"seed": 2}, {"val_fraction": 0.5}, {"tokenizer": "char"}],
)
def test_other_options_are_other_rows(tmp_path, options):
    first = run(tmp_path, classified())
    assert prepare_examples(*given(tmp_path, **options)).path != first.path


def test_options_of_training_change_no_rows(tmp_path):
    first = run(tmp_path, classified())
    assert prepare_examples(*given(tmp_path, learning_rate=0.5, layers=1, steps=3)).path == first.path


def test_a_changed_file_is_prepared_again(tmp_path):
    first = run(tmp_path, classified())
    second = run(tmp_path, classified(44))
    assert second.path != first.path
    assert second.meta["rows"] == {"train": 33, "val": 11}
    path = tmp_path / "table.jsonl"
    os.utime(path, ns=(1, 1))
    assert prepare_examples(*given(tmp_path)).path not in (first.path, second.path)


# Damage ----------------------------------------------------------------------------------------------


def damage_meta(**changes):
    def change(folder):
        path = folder / "meta.json"
        meta = json.loads(path.read_text())
        for name, value in changes.items():
            if value is None:
                del meta[name]
            else:
                meta[name] = value
        path.write_text(json.dumps(meta))

    return change


def rewritten(name, data):
    return lambda folder: (folder / name).write_bytes(data)


DAMAGES = {
    "meta is no JSON": rewritten("meta.json", b"{"),
    "meta is nested": rewritten("meta.json", b"[" * 100_000),
    "no labels": damage_meta(labels=None),
    "labels are numbers": damage_meta(labels=[1, 2]),
    "no words": damage_meta(words=0),
    "targets are text": damage_meta(targets="1"),
    "a key too many": damage_meta(more=1),
    "rows of one side": damage_meta(rows={"train": 30}),
    "tokens of a language model": damage_meta(dtype="uint16"),
    "another version": damage_meta(version=99),
    "another vocabulary": damage_meta(vocab_size=300),
    "no references": lambda folder: (folder / "held_out.jsonl").unlink(),
    "references are empty": rewritten("held_out.jsonl", b""),
    "references are rubbish": rewritten("held_out.jsonl", b"\xff\xfe{[" * 50),
    "references are other texts": rewritten("held_out.jsonl", b'"no"\n' * 10),
    "rows are cut short": lambda folder: os.truncate(folder / "val.bin", 100),
    "rows are others": lambda folder: (folder / "val.bin").write_bytes(
        bytes((folder / "val.bin").stat().st_size)
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_told_and_prepared_again(tmp_path, told, name):
    first = run(tmp_path, classified())
    sound = first.val.tobytes()
    del first
    (folder,) = (tmp_path / "prepared").glob("table-*")
    DAMAGES[name](folder)
    with pytest.raises(DataError, match=str(tmp_path)):
        open_prepared(folder)
    told.clear()
    again = prepare_examples(*given(tmp_path))
    assert again.val.tobytes() == sound
    assert [one for one in told.messages if one.startswith("preparing again: ")]


CELLS = b'{"text":"t","label":"no"}\n'
DAMAGED_CELLS = {
    "bytes": b"\xff\xfe", "no JSON": b"{\n" * 10, "nested": b"[" * 100_000 + b"\n", "numbers": b"1\n" * 10,
    "texts": b'"no"\n' * 10, "numbers in cells": b'{"label":1}\n' * 10, "too few": CELLS * 9,
    "too many": CELLS * 11, "no line feed": CELLS * 9 + CELLS[:-1],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED_CELLS)
def test_references_that_were_damaged_since(tmp_path, name):
    corpus = run(tmp_path, classified())
    (corpus.path / "held_out.jsonl").write_bytes(DAMAGED_CELLS[name])
    with pytest.raises(DataError, match=r"held_out.jsonl is damaged"):
        held_out(corpus)


# What tables may hold --------------------------------------------------------------------------------


ODD = [
    "a\u2028b",
    "a\x85b",
    "a\x0cb",
    "a\x1cb",
    "new\nline",
    "cr\r\nlf",
    '"quoted"',
    "\\",
    " a ",
    "é",
    "\U0001f600",
]


def test_labels_and_references_may_be_any_text(tmp_path):
    rows = classified(10 * len(ODD), ODD)
    corpus = run(tmp_path, rows)
    assert corpus.meta["labels"] == sorted(ODD)
    assert set(references(corpus)) == set(ODD)
    corpus = run(tmp_path, [{"source": f"{n}", "target": f"{n} {ODD[n % len(ODD)]}"} for n in range(50)],
                 task="translate")  # fmt: skip
    assert len(references(corpus)) == corpus.meta["rows"]["val"]


def test_numbers_are_labels_by_their_spelling(tmp_path):
    rows = [{"text": f"t{row}", "label": [1, 1.5, True, "1"][row % 4]} for row in range(40)]
    assert run(tmp_path, rows).meta["labels"] == ["1", "1.5", "true"]


def test_many_labels(tmp_path):
    corpus = run(tmp_path, classified(4000, [f"label {number:04}" for number in range(2000)]))
    assert len(corpus.meta["labels"]) == 2000
    assert corpus.meta["rows"]["val"] == 1000


def test_a_text_is_no_label(tmp_path):
    rows = [*classified(3), {"text": "a", "label": "word " * 1000}]
    with pytest.raises(
        DataError, match=r"row 4 of .*table.jsonl \(line 4\): a label of 5,000 char.*--label-column"
    ):
        run(tmp_path, rows)
    assert not list((tmp_path / "prepared").glob("[!.]*"))


def test_labels_that_no_folder_can_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "META_LIMIT_BYTES", 2000)
    with pytest.raises(DataError, match=r"200 labels are too many.*--label-column"):
        run(tmp_path, classified(200, [f"label {number}" for number in range(200)]))


NOTHING_HELD_OUT = {
    "one row": (classified(1), {}),
    "all rows equal": (classified(20, text="t")[:1] * 20, {}),
    "each label once": (classified(20, [f"{n}" for n in range(20)]), {}),
    "all texts equal": (translated(1) * 20, {"task": "translate"}),
}


@pytest.mark.parametrize("name", NOTHING_HELD_OUT)
def test_where_nothing_can_be_held_out_that_is_said(tmp_path, told, name):
    rows, options = NOTHING_HELD_OUT[name]
    corpus = run(tmp_path, rows, **options)
    assert corpus.meta["rows"] == {"train": len(rows), "val": 0}
    assert references(corpus) == [] and len(corpus.rows("val", 8)) == 0
    assert [one for one in told.messages if "no row is held out" in one]


def test_no_validation_is_asked_for(tmp_path, told):
    corpus = run(tmp_path, classified(), val_fraction=0.0)
    assert corpus.meta["rows"] == {"train": 40, "val": 0}
    assert not [one for one in told.messages if "no row is held out" in one]


MISTAKES = {
    "no such column": ({"text": "a"}, {}, ["'label'", "--label-column"]),
    "another column": (classified(1)[0], {"text_column": "body"}, ["'body'", "--text-column"]),
    "an empty label": ({"text": "a", "label": " "}, {}, ["row 1", "'label'", "empty"]),
    "no text": ({"text": None, "label": "a"}, {}, ["row 1", "'text'", "empty"]),
    "an empty target": ({"source": "a", "target": ""}, {"task": "translate"}, ["row 1", "'target'", "empty"]),
    "a list for a label": ({"text": "a", "label": ["b"]}, {}, ["row 1", "'label'", "list"]),
    "a lone surrogate": (
        {"text": "a", "label": "b"},
        {"raw": '{"text": "\\ud800", "label": "b"}\n'},
        ["surrogate"],
    ),
    "no JSON": ({}, {"raw": "{\n"}, ["line 1", "not JSON"]),
    "no rows": ({}, {"raw": ""}, ["table.jsonl"]),
    "no UTF-8": ({}, {"raw": b'{"text": "caf\xe9", "label": "b"}\n'}, ["0xe9", "--errors replace"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_table_names_file_and_row(tmp_path, name):
    row, options, words = MISTAKES[name]
    raw = options.get("raw")
    source = table(tmp_path, [row])
    if raw is not None:
        (tmp_path / "table.jsonl").write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    with pytest.raises(DataError) as caught:
        run(tmp_path, source, **{key: value for key, value in options.items() if key != "raw"})
    assert all(word in str(caught.value) for word in ["table.jsonl", *words]), caught.value
    assert not list((tmp_path / "prepared").glob("[!.]*")), "a folder was left"


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"vocab_size": 100}, UsageError, "vocab_size 100 is too small"),
        ({"val_fraction": 1.0}, UsageError, "val_fraction is 1.0"),
        ({"tokenizer": "no/such.json"}, DataError, "cannot read tokenizer no/such.json"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, kind, words):
    with pytest.raises(kind, match=words):
        run(tmp_path, classified(), **options)


def test_what_is_left_out_is_said(tmp_path, told):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "a.de").write_bytes(b"eins\n\ndr\xe9i\n" + b"".join(b"%d\n" % n for n in range(9)))
    (tmp_path / "t" / "a.en").write_bytes(b"one\n\nthree\n" + b"".join(b"%d\n" % n for n in range(9)))
    (tmp_path / "t" / "readme.md").write_text("not one of them")
    columns = {"source_column": "de", "target_column": "en", "errors": "replace"}
    corpus = run(tmp_path, str(tmp_path / "t"), task="translate", **columns)
    assert corpus.meta["rows"] == {"train": 8, "val": 3}
    for said in ("passed over: 1 .md", "empty in all files, left out: 1", "now U+FFFD: in 1 places"):
        assert [one for one in told.messages if said in one], said


def test_entries_of_catalogues_that_are_left_out_are_said(tmp_path, told):
    pytest.importorskip("polib")
    entries = "".join(f'msgid "m{n}"\nmsgstr "t{n}"\n\n' for n in range(9)) + 'msgid "more"\nmsgstr ""\n'
    (tmp_path / "de.po").write_text(
        'msgid ""\nmsgstr "Content-Type: text/plain; charset=UTF-8\\n"\n\n' + entries
    )
    columns = {"source_column": "msgid", "target_column": "msgstr"}
    run(tmp_path, str(tmp_path / "de.po"), task="translate", **columns)
    assert "untranslated entries of catalogues, left out: 1" in told.messages


def test_one_label_is_nothing_to_learn(tmp_path, told):
    corpus = run(tmp_path, classified(20, ["all"]))
    assert (corpus.meta["rows"]["val"], corpus.meta["labels"]) == (5, ["all"])
    assert "all rows have the label 'all': there is nothing to learn" in told.messages


# Tokenizers ------------------------------------------------------------------------------------------


def test_characters_that_only_validation_has_are_known(tmp_path):
    rows = [{"text": chr(0x4E00 + row), "label": LETTERS[row % 2]} for row in range(40)]
    corpus = run(tmp_path, rows, tokenizer="char")
    assert corpus.tokenizer.vocab_size >= 40
    assert (corpus.rows("val", 8).rows(np.arange(10))[0][:, 0] < corpus.tokenizer.vocab_size).all()


def test_the_tokenizer_of_another_corpus(tmp_path):
    first = run(tmp_path, classified(), tokenizer="bpe", vocab_size=265)
    path = str(first.path / "tokenizer.json")
    second = run(tmp_path, translated(), task="translate", tokenizer=path)
    assert second.tokenizer.vocab_size == first.tokenizer.vocab_size == 265
    assert second.meta["tokenizer_sha256"] == first.meta["tokenizer_sha256"]
    with pytest.raises(UsageError, match="100"):
        run(tmp_path, translated(), task="translate", tokenizer=path, vocab_size=100)


def test_a_character_that_a_tokenizer_lacks_names_its_row(tmp_path):
    path = str(run(tmp_path, classified(), tokenizer="char").path / "tokenizer.json")
    rows = [*classified(10), {"text": "t€xt", "label": "no"}]
    with pytest.raises(DataError, match="€") as caught:
        run(tmp_path, rows, tokenizer=path)
    assert "row 11 of" in str(caught.value)
