"""Tables are read as they stand, or refused by row and line; nothing is reshaped in silence."""

import pytest

from tf_dist.data import tables
from tf_dist.data.corpus import Corpus
from tf_dist.data.decoding import Counts
from tf_dist.errors import DataError


def read(path, **options):
    corpus, counts = Corpus([str(path)], **options), Counts()
    for _ in corpus.pieces(counts):
        pass
    return list(corpus), counts


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("name", "data", "where", "what"),
    [
        ("a.csv", 'id,text\n1,"she said \\"come in\\" and left"\n2,b\n', "row 1", "written twice"),
        ("a.csv", 'id,text\n1,a\n2,"b" c\n', "row 2 of the table", "goes on behind its closing quote"),
        ("a.tsv", 'id\ttext\n1\t"b" c\n', "(line 2)", "goes on behind its closing quote"),
        ("a.csv", "id,text\n1,a\rb\n2,c\n", "row 1", "a carriage return alone"),
        ("a.csv", "text,id\na\rb,1\n", "row 1", "a carriage return alone"),
        ("a.csv", "text\ra\rb\r", "the header", "a carriage return alone"),
        ("a.csv", 'id,text\n1,"a\nb"\n\n2,c,d\n', "row 2 of the table", "more cells than columns: 3, and 2"),
        ("a.csv", 'id,text\n1,"a\nb"\n\n2,c,d\n', "(line 5)", "Quote cells"),
        ("a.csv", "text,id,tag\na,1\n", "row 1", "fewer cells than columns: 2, and 3"),
        ("a.csv", "text,id\na,1,\nb,2,\n", "row 1", "more cells"),
        ("a.csv", 'id,text\n1,"a\n2,b\n', "row 1", "never closed"),
        ("a.csv", "id,text,text\n1,a,b\n", "2 columns 'text'", "Rename"),
        ("a.csv", "id;text\n1;a\n", "no column 'text'", "separated by ';'"),
        ("a.tsv", "id,text\n1,a\n", "no column 'text'", "separated by ','"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": 5}\n', "row 2 of", "(line 3): column 'text' holds int"),
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "line 2 of", "the key 'text' twice"),
        ("a.jsonl", '{"text": Infinity}\n', "row 1", "holds float"),
        ("a.jsonl", '{"body": "a"}\n', "no column 'text'", "Columns: body"),
    ],
)
def test_refused_by_its_row(tmp_path, name, data, where, what):
    message = refused(write(tmp_path / name, data))
    assert where in message
    assert what in message


@pytest.mark.parametrize(
    ("name", "data", "expected", "nulls"),
    [
        ("a.csv", '\ufeffid,text\r\n1,"a ""b"",\r\n\r\nd"\r\n2,"e\rf"\r\n', ['a "b",\r\n\r\nd', "e\rf"], 0),
        ("a.csv", 'text\n5" pipe\nsaid "so"\n', ['5" pipe', 'said "so"'], 0),
        ("a.csv", "id,text\n1,NaN\n2,\n3,\"\"\n4,null\n5, x \n", ["NaN", "null", " x "], 2),
        ("a.csv", "text\n\na\n\n", ["a"], 2),
        ("a.csv", "id,text,id\n1,a,2\n", ["a"], 0),
        ("a.csv", ",text\n0,a\n1,b", ["a", "b"], 0),
        ("a.csv", "text,n\nx\0y,1\nx\0z,2\nx,3\n", ["x\0y", "x\0z", "x"], 0),
        ("a.tsv", "text\tn\na, b\t1\n", ["a, b"], 0),
        ("a.jsonl", '\ufeff{"text": "a"}\r\n{"text": null}\n{"text": NaN}\n{"n": {"text": 1}}', ["a"], 3),
        ("a.jsonl", '{"text": "a\\u2028b\\u0000c\u2028\x85"}\n', ["a\u2028b\0c\u2028\x85"], 0),
        ("a.jsonl", '{"text": "a", "m": {"k": 1, "k": 2}, "n": 1, "n": 2}\n', ["a"], 0),
    ],
)  # fmt: skip
def test_read_as_it_stands(monkeypatch, tmp_path, name, data, expected, nulls):
    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 2)
    documents, counts = read(write(tmp_path / name, data))
    assert (documents, counts.nulls) == (expected, nulls)


def test_long_cells(monkeypatch, tmp_path):
    long = "word " * 100_000
    path = write(tmp_path / "a.csv", f'id,text\n1,"{long}"\n2,{long}\n')
    assert read(path)[0] == [long, long]
    monkeypatch.setattr(tables, "LINE_CHARACTERS", 1000)
    assert "row 1 of the table" in refused(path)


def test_rows_are_counted_across_chunks_with_empty_cells(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 2)
    data = "".join(f'{{"text": {cell}}}\n' for cell in ['"a"', "null", '"b"', "null", "[1]"])
    assert "row 5 of" in refused(write(tmp_path / "a.jsonl", data))


@pytest.fixture
def parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def make(column, name="text", **others):
        columns = {name: column, **others}
        pq.write_table(pa.table(columns), tmp_path / "a.PARQUET", row_group_size=2)
        return tmp_path / "a.PARQUET"

    return make


RAW = [b"good", None, b"caf\xe9 by the river", b"NaN"]


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "dictionary"])
def test_every_type_of_text_in_parquet(monkeypatch, parquet, kind):
    import pyarrow as pa

    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 3)
    wide = pa.large_binary() if kind.startswith("large") else pa.binary()
    column = pa.array(RAW, wide)
    if not kind.endswith("binary"):
        text = pa.large_string() if kind == "large_string" else pa.string()
        column = pa.Array.from_buffers(text, len(RAW), column.buffers(), 1)
    if kind == "dictionary":
        column = column.dictionary_encode()
    path = parquet(column)
    message = refused(path)
    assert "row 3 of" in message
    assert "byte 0xe9 at offset 3 of the cell" in message
    documents, counts = read(path, errors="replace")
    assert documents == ["good", "caf\ufffd by the river", "NaN"]
    assert (counts.replaced, counts.nulls) == (1, 1)


def test_parquet_of_other_types(parquet):
    import pyarrow as pa

    assert "holds double, not text" in refused(parquet(pa.array([float("nan"), 1.0])))
    assert "holds list<" in refused(parquet(pa.array([["a"]])))
    assert "has no text in it" in refused(parquet(pa.array([None, None])))
    assert "Columns: body" in refused(parquet(pa.array(["a"]), "body"))


def test_parquet_with_a_name_twice(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    assert "2 columns 'text'" in refused(tmp_path / "a.parquet")
