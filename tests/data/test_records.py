"""Records of several named columns: of tables, catalogues and parallel text; complete, or refused by row."""

import gzip
import json
from collections import Counter

import pytest

from tf_dist.data.records import Record, RecordCounts, Records, read_records
from tf_dist.errors import DataError, UsageError

PAIR = {"source": "en", "target": "de"}
LABELLED = {"text": "text", "label": "label"}


def write(path, data):
    data = data if isinstance(data, bytes) else data.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def values(*sources, columns=PAIR, **options):
    return [tuple(record.values.values()) for record in read_records(sources, columns, **options)]


def refused(*sources, columns=PAIR, **options):
    with pytest.raises(DataError) as caught:
        values(*sources, columns=columns, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TABLES = {
    "a.csv": 'n,de,en\n1,Haus,house\n2,"ja, ja","yes\nyes"\n',
    "a.tsv": 'n\tde\ten\n1\tHaus\thouse\n2\tja, ja\t"yes\nyes"\n',
    "a.jsonl": '{"en": "house", "de": "Haus", "n": 1}\n\n{"de": "ja, ja", "en": "yes\\nyes"}\n',
}


@pytest.mark.parametrize("name", [*TABLES, "a.csv.gz", "a.jsonl.gz"])
def test_columns_by_role_in_the_order_that_is_asked_for(tmp_path, name):
    path = write(tmp_path / name, TABLES[name.removesuffix(".gz")])
    assert values(path) == [("house", "Haus"), ("yes\nyes", "ja, ja")]
    assert values(path, columns={"target": "de", "source": "en"}) == [
        ("Haus", "house"),
        ("ja, ja", "yes\nyes"),
    ]
    first, second = Records([path], PAIR).read()
    assert first.values == {"source": "house", "target": "Haus"}
    assert first.folder == tmp_path
    assert second.where == f"row 2 of {path} (line 3)"


def test_parquet_with_columns_in_another_order_and_one_for_two_roles(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = pa.table(
        {"de": ["Haus", "ja"], "n": [1, 2], "en": pa.array(["house", "yes"]).dictionary_encode()}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    assert values(path) == [("house", "Haus"), ("yes", "ja")]
    assert values(path, columns={"source": "en", "target": "en"}) == [("house",) * 2, ("yes",) * 2]
    assert values(path, columns={"text": "en", "label": "n"}) == [("house", "1"), ("yes", "2")]
    assert "column 'n' holds int64, not text. Use --target-column" in refused(
        path, columns={"source": "en", "target": "n"}
    )
    assert "no column 'fr'. Columns: de, n, en. Use --source-column" in refused(
        path, columns={"source": "fr"}
    )


@pytest.mark.parametrize(
    ("spelled", "label"), [("3", "3"), ("-1.5", "-1.5"), ("true", "true"), ("2.0", "2.0"), ('"x"', "x")]
)
def test_labels_may_be_numbers_and_booleans(tmp_path, spelled, label):
    path = write(tmp_path / "a.jsonl", f'{{"text": "a", "label": {spelled}}}\n')
    assert values(path, columns=LABELLED) == [("a", label)]
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"], "label": [json.loads(spelled)]}), tmp_path / "a.parquet")
    assert values(str(tmp_path / "a.parquet"), columns=LABELLED) == [("a", label)]


@pytest.mark.parametrize(
    ("name", "data", "columns", "what"),
    [
        ("a.csv", "en,de\na,b\nc,\n", PAIR, "row 2 of {path} (line 3): column 'de' is empty"),
        ("a.csv", "en,de\na, \n", PAIR, "row 1 of {path} (line 2): column 'de' is empty"),
        (
            "a.csv",
            "en,fr\na,b\n",
            PAIR,
            "{path} has no column 'de'. Columns: en, fr. Use --target-column NAME",
        ),
        ("a.csv", "en,de,de\na,b,c\n", PAIR, "2 columns 'de'"),
        ("a.csv", "en,de\na\n", PAIR, "fewer cells than columns"),
        ("a.csv", "en,de\n", PAIR, "{path} has no rows"),
        ("a.jsonl", '{"en": "a", "de": "b"}\n{"en": "a"}\n', PAIR, "row 2 of {path} (line 2): column 'de'"),
        ("a.jsonl", '{"en": "a", "de": null}\n', PAIR, "row 1 of {path} (line 1): column 'de' is empty"),
        ("a.jsonl", '{"en": "a", "fr": "b"}\n', PAIR, "no column 'de'. Columns: en, fr."),
        ("a.jsonl", '{"en": "a", "de": 5}\n', PAIR, "'de' holds int, not text. Use --target-column"),
        ("a.jsonl", '{"en": "a", "de": "b", "de": "c"}\n', PAIR, "the key 'de' twice"),
        ("a.jsonl", '{"text": "a", "label": [1]}\n', LABELLED, "holds list, neither text nor a number"),
        ("a.jsonl", '{"text": "a", "label": Infinity}\n', LABELLED, "holds float"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', LABELLED, "row 1 of {path} (line 1): column 'label'"),
        ("a.txt", "en de", PAIR, "unsupported file type"),
        ("a.de", "b\n", PAIR, "a.en is missing beside a.de"),
        ("a.po", 'msgid "a"\nmsgstr "b"\n', PAIR, "no column 'en'. Columns: msgid, msgstr, msgctxt."),
    ],
)
def test_refused_by_file_and_row(tmp_path, name, data, columns, what):
    path = write(tmp_path / name, data)
    assert what.format(path=path) in refused(path, columns=columns)


def test_optional_roles_may_be_empty_and_are_counted(tmp_path):
    path = write(tmp_path / "a.csv", "question,context,answer\nq,,a\nr,c,b\n")
    columns = {role: role for role in ("question", "context", "answer")}
    counts = RecordCounts()
    assert values(path, columns=columns, optional=["context"], counts=counts) == [
        ("q", "", "a"),
        ("r", "c", "b"),
    ]
    assert (counts.documents, counts.nulls, counts.text_bytes) == (2, 1, 5)
    assert "column 'context' is empty" in refused(path, columns=columns)


CATALOGUE = """
# of the translators
msgid ""
msgstr ""
"Content-Type: text/plain; charset=UTF-8\\n"

msgid "Yes"
msgstr "Ja"

#, fuzzy
msgid "No"
msgstr "Nie"

msgid "Maybe"
msgstr ""

msgctxt "month"
msgid "May"
msgstr "Mai"

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

#~ msgid "Old"
#~ msgstr "Alt"
"""
MESSAGES = {"source": "msgid", "target": "msgstr"}


def test_catalogues(tmp_path):
    pytest.importorskip("polib")
    path, counts = write(tmp_path / "de.po", CATALOGUE), RecordCounts()
    found = values(path, columns=MESSAGES, counts=counts)
    assert found == [("Yes", "Ja"), ("May", "Mai"), ("%d file", "%d Datei"), ("%d files", "%d Dateien")]
    assert counts.skipped == Counter(untranslated=1, fuzzy=1, obsolete=1)
    records = list(Records([path], MESSAGES | {"context": "msgctxt"}, optional=["context"]).read())
    assert [record.values["context"] for record in records] == ["", "month", "", ""]
    assert records[1].where.startswith(f"row 2 of {path} (line 1")
    # A language without plural forms has one form for any number.
    one = 'msgid "%d file"\nmsgid_plural "%d files"\nmsgstr[0] "%d 个文件"\n'
    assert values(write(tmp_path / "zh.po", one), columns=MESSAGES) == [("%d files", "%d 个文件")]


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("hello\nworld\n", "is no gettext catalogue"),
        ('msgid "a"b"\nmsgstr "c"\n', "is no gettext catalogue"),
        ('msgid "a\nmsgstr "b"\n\nmsgid "c\nmsgstr "d"\n\nmsgid "e"\nmsgstr "f"\n', "catalogue"),
        ('msgid "a"\nmsgstr ""\n', "has no rows"),
    ],
)
def test_no_catalogue(tmp_path, data, what):
    pytest.importorskip("polib")
    assert what in refused(write(tmp_path / "a.po", data), columns=MESSAGES)


def test_a_catalogue_that_is_named_like_a_file_is_not_read_from_there(tmp_path, monkeypatch):
    pytest.importorskip("polib")
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "secret", 'msgid "a"\nmsgstr "b"\n')
    assert "is no gettext catalogue" in refused(write(tmp_path / "a.po", "secret"), columns=MESSAGES)


def test_parallel_text(tmp_path):
    german = write(tmp_path / "train.de", "Haus\r\n\r\nja\u2028ja\n")
    english = write(tmp_path / "train.en.gz", "house\n\nyes")
    write(tmp_path / "other.txt", "not read\n")
    counts = RecordCounts()
    expected = [("house", "Haus"), ("yes", "ja\u2028ja")]
    assert values(german, english, counts=counts) == expected
    assert (counts.documents, counts.empty) == (2, 1)
    records = Records([str(tmp_path)], PAIR)
    assert [tuple(record.values.values()) for record in records.read()] == expected
    assert records.passed_over == {".txt": 1}
    assert [record.where for record in records.read()][1] == f"line 3 of {english} and {german}"


def test_parallel_text_among_tables_stands_where_its_first_file_does(tmp_path):
    names = [
        write(tmp_path / "b.csv", "en,de\n1,eins\n"),
        write(tmp_path / "train.de", "zwei\n"),
        write(tmp_path / "a.csv", "en,de\n3,drei\n"),
        write(tmp_path / "train.en", "2\n"),
    ]
    assert values(*names) == [("1", "eins"), ("2", "zwei"), ("3", "drei")]


def test_parallel_text_of_unequal_length(tmp_path):
    german = write(tmp_path / "train.de", "eins\nzwei\n")
    english = write(tmp_path / "train.en", "one\ntwo\nthree\nfour\n")
    message = refused(german, english)
    assert f"{german} has 2 lines" in message and f"{english} has 4 lines" in message
    assert f"The first missing one is line 3 of {german}" in message
    write(tmp_path / "train.de", "eins\n\ndrei\nvier\n")
    assert f"line 2 of {english} and {german}: column 'de' is empty" in refused(german, english)


def test_parallel_text_with_a_column_in_two_files(tmp_path):
    for name in ("a.de", "a.de.gz", "a.en"):
        write(tmp_path / name, "x\n")
    assert "column 'de' is in two files" in refused(str(tmp_path))


def test_what_cannot_be_asked_for(tmp_path):
    path = write(tmp_path / "a.csv", "en,de\na,b\n")
    with pytest.raises(UsageError, match="strict or replace"):
        read_records([path], PAIR, errors="ignore")
    with pytest.raises(UsageError, match="no column is named"):
        read_records([path], {})
    assert "stdlib is text without columns" in refused("stdlib")


def test_invalid_bytes_are_replaced_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", b"en,de\nhouse,H\xe4us\n")
    assert "not UTF-8" in refused(path)
    counts = RecordCounts()
    assert values(path, errors="replace", counts=counts) == [("house", "H\ufffdus")]
    assert counts.replaced == 1


def test_a_record_is_what_its_reader_gives(tmp_path):
    path = write(tmp_path / "a.csv", "en,de\na,b\n")
    (record,) = read_records([path], PAIR)
    assert record == Record(f"row 1 of {path} (line 2)", tmp_path, {"source": "a", "target": "b"})
