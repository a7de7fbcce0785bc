import gzip
import os
import sysconfig
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tf_dist.data import corpus as corpus_module
from tf_dist.data import decoding, sources, tables
from tf_dist.data.corpus import Corpus
from tf_dist.data.decoding import Counts
from tf_dist.data.tokenizer import train_tokenizer
from tf_dist.errors import DataError, UsageError


def read(*values, **options):
    """All documents and what was counted."""
    corpus, counts = Corpus([str(value) for value in values], **options), Counts()
    for _ in corpus.pieces(counts):
        pass
    return list(corpus), counts


def refused(*values, **options):
    with pytest.raises(DataError) as caught:
        read(*values, **options)
    assert caught.value.exit_code == 65
    return str(caught.value)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


# Text files


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "A.TXT", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path, name):
    path = write(tmp_path / name, "one\r\ntwo \x00 é\n".encode())
    documents, counts = read(path)
    assert documents == ["one\r\ntwo \x00 é\n"]  # CRLF and NUL stay
    assert (counts.documents, counts.text_bytes) == (1, 14)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_byte_order_mark_is_dropped_once(tmp_path, name):
    assert read(write(tmp_path / name, b"\xef\xbb\xbfa\xef\xbb\xbf"))[0] == ["a\ufeff"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl.gz", "a.csv"])
def test_bad_bytes_stop_with_their_offset(tmp_path, name):
    head = b'{"text": "ab"}\n{"text": "' if ".jsonl" in name else b"text\nab\n"
    path = write(tmp_path / name, head + b"\xc3\xa9\xff" + (b'"}\n' if ".jsonl" in name else b"\n"))
    message = refused(path)
    assert f"byte 0xff at offset {len(head) + 2}" in message
    assert str(path) in message
    assert "--errors replace" in message


def test_bad_bytes_are_replaced_and_counted(tmp_path):
    path = write(tmp_path / "a.txt", b"a\xffb\xef\xbf\xbdc\xe2\x82")
    documents, counts = read(path, errors="replace")
    assert documents == ["a\ufffdb\ufffdc\ufffd"]
    assert counts.replaced == 2  # the middle one stood there already


@given(data=st.binary(max_size=80), read_bytes=st.integers(1, 7))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_in_blocks_of_any_size(monkeypatch, tmp_path, data, read_bytes):
    monkeypatch.setattr(decoding, "READ_BYTES", read_bytes)
    path = write(tmp_path / "a.txt", b"." + data)
    expected = b"." + data
    documents, counts = read(path, errors="replace")
    assert documents == [expected.decode("utf-8", "replace")]
    genuine = expected.count("\ufffd".encode())
    assert counts.replaced == documents[0].count("\ufffd") - genuine
    try:
        expected.decode()
    except UnicodeDecodeError as error:
        assert f"offset {error.start} " in refused(path)
    else:
        assert read(path)[0] == documents


def test_truncated_and_false_gz(tmp_path):
    whole = gzip.compress(os.urandom(5000).hex().encode())
    (tmp_path / "cut.txt.gz").write_bytes(whole[:3000])
    (tmp_path / "false.txt.gz").write_bytes(b"not zipped")
    assert "is damaged" in refused(tmp_path / "cut.txt.gz")
    assert "is damaged" in refused(tmp_path / "false.txt.gz")


def test_growing_file_is_read_as_it_was_listed(tmp_path):
    path = write(tmp_path / "a.txt", b"first")
    corpus = Corpus([str(path)])
    path.write_bytes(b"first and more")
    assert list(corpus) == ["first"]


# Pieces of long documents


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("ab \n\t\ré"), min_size=2, max_size=200))
def test_cutting_changes_no_token(text):
    at = corpus_module.cut(text)
    assert 0 < at < len(text)
    whole = BPE.encode(text).tolist()
    parts = [*BPE.encode(text[:at]), *BPE.encode(text[at:])]
    if at != len(text) - 1:
        assert parts == whole


BPE = train_tokenizer("bpe", ["ab a bab \n\n ba\n aé ab\tb  a\r\n ab a"] * 5, 300)


def test_long_document_in_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(decoding, "READ_BYTES", 64)
    text = "".join(f"word {number}\n" for number in range(500)) + "x" * 1000
    path = write(tmp_path / "a.txt", text.encode())
    pieces = list(Corpus([str(path)]).pieces(Counts()))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) < 300
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert list(Corpus([str(path)])) == [text]


# Tables


def table(path, cells, column="text"):
    frame = pd.DataFrame({"id": range(len(cells)), column: cells})
    kind = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    return path


TABLES = ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.gz"]


@pytest.mark.parametrize("name", TABLES)
def test_one_row_is_one_document(monkeypatch, tmp_path, name):
    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 2)
    cells = ["plain", None, "NA", "123", "2020-01-01", 'a "quote", and\nlines\ttabs', "é 漢", "true", " b "]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    documents, counts = read(table(tmp_path / name, cells))
    assert documents == [cell for cell in cells if cell is not None]
    assert (counts.nulls, counts.documents) == (1, 8)


@pytest.mark.parametrize("name", TABLES)
def test_column_by_name(tmp_path, name):
    path = table(tmp_path / name, ["one"], column="body")
    assert read(path, text_column="body")[0] == ["one"]
    message = refused(path)
    assert "has no column 'text'. Columns: id, body. Use --text-column NAME" in message


def test_cells_that_are_not_text(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": 5}\n')
    assert "row 2 of" in refused(path)
    assert "holds int, not text" in refused(path)
    assert "not text" in refused(table(tmp_path / "a.parquet", [1, 2]))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("a.jsonl", b'["text"]\n'),
        ("a.jsonl", b"[" * 100_000),
        ("a.csv", b'text\n"never closed\n'),
        ("a.csv", b"text,b\n1,2\n1,2,3,4\n"),
        ("a.parquet", b"PAR1 and no more"),
        ("a.csv", b"text\nDear Sir, hello\n"),
    ],
)
def test_damaged_tables(tmp_path, name, data):
    message = refused(write(tmp_path / name, data))
    assert str(tmp_path / name) in message
    assert "table" in message or "more cells than columns" in message


def test_missing_keys_in_later_json_lines_are_nulls(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "ROWS_PER_CHUNK", 1)
    path = write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"other": 1}\n{"text": "b"}\n')
    documents, counts = read(path)
    assert (documents, counts.nulls) == (["a", "b"], 1)


def test_half_a_surrogate_pair_in_json(tmp_path):
    path = write(tmp_path / "a.jsonl", rb'{"text": "a\ud800b"}')
    assert "surrogate" in refused(path)
    documents, counts = read(path, errors="replace")
    assert (documents, counts.replaced) == (["a\ufffdb"], 1)


def test_parquet_with_bad_bytes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    raw = pa.array([b"good", b"a\xff", None], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, raw.buffers(), raw.null_count)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert "row 2 of" in refused(tmp_path / "a.parquet")
    assert "byte 0xff at offset 1 of the cell" in refused(tmp_path / "a.parquet")
    documents, counts = read(tmp_path / "a.parquet", errors="replace")
    assert (documents, counts.replaced, counts.nulls) == (["good", "a\ufffd"], 1, 1)


def test_parquet_without_pyarrow(monkeypatch, tmp_path):
    path = write(tmp_path / "a.parquet", b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "pip install 'tf_dist[parquet]'" in refused(path)


# Which files


def test_folders_globs_and_order(tmp_path):
    for name in ["b.txt", "a/z.md", "a/b/y.py", "c.bin", ".hidden/x.txt", "a/empty.txt"]:
        write(tmp_path / name, b"" if "empty" in name else name.encode())
    documents, counts = read(tmp_path)
    assert documents == ["a/b/y.py", "a/z.md", "b.txt"]
    assert counts.empty == 1
    assert read(tmp_path / "**" / "*.[pm]*")[0] == ["a/b/y.py", "a/z.md"]
    # In the order of the values, and each file once.
    assert read(tmp_path / "b.txt", tmp_path, tmp_path / "b.txt")[0] == ["b.txt", "a/b/y.py", "a/z.md"]


def test_a_name_with_glob_signs_is_a_name_first(tmp_path):
    assert read(write(tmp_path / "a[1].txt", b"x"))[0] == ["x"]


def test_nothing_there(tmp_path):
    assert "no such file or folder" in refused(tmp_path / "none.txt")
    assert "no file matches" in refused(tmp_path / "*.txt")
    assert "no .txt .md" in refused(tmp_path)
    write(tmp_path / "a.bin", b"x")
    assert "among the 1 matches" in refused(tmp_path / "*")
    assert "no data" in refused()


@pytest.mark.parametrize("name", ["a.bin", "a", "a.gz", "a.parquet.gz"])
def test_unknown_suffix(tmp_path, name):
    assert "is of an unsupported file type: we read .txt" in refused(write(tmp_path / name, b"x"))


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.txt.gz"])
def test_empty_file(tmp_path, name):
    assert "has no text in it" in refused(write(tmp_path / name, b""))
    assert "no text in" in refused(tmp_path)


def test_table_without_rows(tmp_path):
    assert "has no text in it" in refused(write(tmp_path / "a.csv", b"text\n"))


def test_links_that_loop(tmp_path):
    write(tmp_path / "d/a.txt", b"x")
    (tmp_path / "d/up").symlink_to(tmp_path / "d")
    assert "link back to a folder around it" in refused(tmp_path / "d")
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    assert "symbolic links" in refused(tmp_path / "self.txt")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    assert "cannot read" in refused(tmp_path / "gone.txt")


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    assert "not a regular file" in refused(tmp_path / "a.txt")


def test_unreadable(monkeypatch, tmp_path):
    path = write(tmp_path / "a.txt", b"x")

    def refuse(*_args, **_words):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(decoding, "opened_regular", refuse)  # root may read everything
    assert f"cannot read {path}: Permission denied" in refused(path)
    monkeypatch.setattr(sources.os, "listdir", refuse)
    assert f"cannot list {tmp_path}: Permission denied" in refused(tmp_path)


def test_options_that_cannot_be_right(tmp_path):
    path = write(tmp_path / "a.txt", b"x")
    for options in ({"errors": "ignore"}, {"max_bytes": -1}):
        with pytest.raises(UsageError):
            Corpus([str(path)], **options)


# The standard library


def test_stdlib_sample_is_deterministic_and_capped():
    documents, counts = read("stdlib", max_bytes=300_000)
    assert documents == read("stdlib", max_bytes=300_000)[0]
    assert 250_000 < counts.text_bytes <= 300_000
    root = Path(sysconfig.get_paths()["stdlib"])
    labels = [file.label for file in Corpus(["stdlib"]).files]
    assert labels == sorted(labels)
    assert (root / labels[0]).is_file()
    assert not any("site-packages" in label for label in labels)


def test_stdlib_too_small():
    assert "Raise --max-bytes" in refused("stdlib", max_bytes=1)


def test_stdlib_leaves_out_duplicates_and_other_encodings(monkeypatch, tmp_path):
    for name, data in {
        "a.py": b"x = 1",
        "b.py": b"x = 1",
        "c.py": b"# \xff",
        "site-packages/d.py": b"y",
    }.items():
        write(tmp_path / name, data)
    monkeypatch.setattr(sources.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents, counts = read("stdlib")
    assert documents == ["x = 1"]
    assert (counts.duplicates, counts.not_utf8) == (1, 1)
