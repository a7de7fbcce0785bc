"""Files that are not what their name says: told by what they are, never trained on."""

import bz2
import gzip
import lzma
import zipfile

import pytest

from tf_dist.data import decoding
from tf_dist.data.corpus import Corpus
from tf_dist.data.decoding import Counts, lines, split_name
from tf_dist.errors import DataError

TEXT = "the river is wide and the boat is small\n" * 40


def read(path, **options):
    corpus, counts = Corpus([str(path)], **options), Counts()
    for _ in corpus.pieces(counts):
        pass
    return list(corpus), counts


def refused(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def write(path, data):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".GZ", ".bz2", ".BZ2", ".xz", ".Xz", ".zst", ".ZST"])
@pytest.mark.parametrize("kind", [".txt", ".TXT", ".jsonl"])
def test_compression_by_the_name_in_any_case(tmp_path, kind, suffix):
    data = b'{"text": "one"}\n{"text": "two"}\n' if kind == ".jsonl" else TEXT.encode()
    if suffix.lower() == ".zst":
        pa = pytest.importorskip("pyarrow")
        packed = pa.compress(data, "zstd", asbytes=True)
    else:
        packed = {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix.lower()].compress(data)
    path = write(tmp_path / f"LOG{kind}{suffix}", packed)
    assert read(path)[0] == (["one", "two"] if kind == ".jsonl" else [TEXT])
    assert "is damaged" in refused(write(path, packed[: len(packed) // 2]))
    assert "is damaged" in refused(write(path, b"nothing that was ever compressed"))


def test_zstd_without_pyarrow(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert "or decompress it: zstd -d" in refused(write(tmp_path / "a.txt.zst", b"\x28\xb5\x2f\xfd"))


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (gzip.compress(TEXT.encode(), mtime=0), "gzip. Let its name end in .gz"),
        (bz2.compress(TEXT.encode()), "bzip2"),
        (lzma.compress(TEXT.encode()), "xz"),
        (b"PK\x03\x04" + bytes(40), "zip archive"),
        (b"SQLite format 3\0" + bytes(40), "SQLite"),
        (b"%PDF-1.7\n%\xe2\xe3", "PDF"),
        (b"PAR1\x15\x04\x15", "Parquet"),
        (b"\x7fELF\x02\x01\x01" + bytes(40), "a program"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a picture"),
        ("short".encode("utf-16-le"), "UTF-16 without"),
        (TEXT.encode("utf-16"), "byte order mark of UTF-16"),
        (TEXT.encode("utf-32"), "byte order mark of UTF-32"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "byte order mark of UTF-16"),
        (TEXT.encode("utf-16-le"), "UTF-16 without"),
        (TEXT.encode("utf-16-be"), "UTF-16 without"),
        (TEXT.encode("utf-32-le"), "UTF-32 without"),
        (TEXT.encode("utf-32-be"), "UTF-32 without"),
        (("широкая река и лодка, да\n" * 30).encode("utf-16-le"), "UTF-16 without"),
        (("ο ποταμός είναι πλατύς\n" * 30).encode("utf-16-be"), "UTF-16 without"),  # noqa: RUF001
        (("नदी चौड़ी है और नाव छोटी\n" * 30).encode("utf-16-le"), "UTF-16 without"),
    ],
)
def test_other_formats_and_encodings(tmp_path, name, data, what, errors):
    assert what in refused(write(tmp_path / name, data), errors=errors)


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize(
    "data", [bytes(5000), b"text " * 2000 + bytes(5000), b"text\n" + bytes(5000) + b"\n"]
)
def test_a_file_that_was_not_written_to_its_end(tmp_path, data, errors):
    at = data.index(bytes(5000))
    for name in ("a.txt", "a.csv"):
        assert f"nothing but NUL from byte {at} on" in refused(write(tmp_path / name, data), errors=errors)


def test_wide_text_behind_narrow_text(monkeypatch, tmp_path):
    monkeypatch.setattr(decoding, "READ_BYTES", 1 << 10)
    path = write(tmp_path / "a.txt", (TEXT * 4).encode() + (TEXT * 4).encode("utf-16-le"))
    assert "UTF-16 without" in refused(path)


@pytest.mark.parametrize(
    "text", ["a\0b" * 40, "\0" * 64, "text,n\nx\0y,2\nx\0z,3\n" * 9, "\t\n\0" * 99, "1\t2\t3\t4\n\0\n" * 30]
)
def test_nul_alone_does_not_make_a_text_wide(tmp_path, text):
    assert read(write(tmp_path / "a.txt", text.encode()))[0] == [text]


def test_another_encoding_is_no_text_with_a_few_bad_bytes(tmp_path):
    russian = ("широкая река и лодка\n" * 40).encode("cp1251")
    path = write(tmp_path / "a.txt", russian)
    assert "byte 0xf8 at offset 0" in refused(path)
    assert "in another encoding" in refused(path, errors="replace")
    for encoding, other in (
        ("gbk", "河很宽。船很小。"),
        ("utf-16-le", "河很宽。船很小。"),
        ("shift_jis", "川は広い。"),
    ):
        path = write(tmp_path / "a.txt", (other * 100).encode(encoding))
        assert "not UTF-8" in refused(path)
        assert "in another encoding" in refused(path, errors="replace")
    latin = ("une rivi\xe8re large, un caf\xe9\n" * 40).encode("latin-1")
    path = write(tmp_path / "b.txt", latin)
    assert "byte 0xe8 at offset 8 " in refused(path)
    documents, counts = read(path, errors="replace")
    assert documents == [latin.decode("utf-8", "replace")]
    assert counts.replaced == 80


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456789\n"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.parquet"])
def test_pointers_in_place_of_files(tmp_path, name):
    assert "pointer of git-lfs, not the file itself. Fetch it: git lfs pull" in refused(
        write(tmp_path / name, LFS)
    )
    assert "git annex get" in refused(write(tmp_path / name, b"/annex/objects/SHA256E-s9--ab.txt\n"))
    with pytest.raises(DataError, match="git-annex"):  # nor is one in a folder passed over
        list(Corpus([str(tmp_path)]))


def test_a_text_about_pointers_is_a_text(tmp_path):
    text = "A pointer reads:\n" + LFS.decode()
    assert read(write(tmp_path / "a.txt", text.encode()))[0] == [text]
    long = LFS.decode() + TEXT
    assert read(write(tmp_path / "b.txt", long.encode()))[0] == [long]


def test_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", TEXT)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    for name in ("a.zip", "a.tar.gz"):
        assert "Unpack it first." in refused(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Notes.TXT.GZ", (".txt", ".gz")),
        ("a.csv", (".csv", "")),
        ("a.gz", ("", ".gz")),
        ("gz", ("", "")),
        ("a.b.Parquet", (".parquet", "")),
        (".txt", ("", "")),
    ],
)
def test_suffixes(name, expected):
    assert split_name(name) == expected


def test_lines_end_at_line_feeds_only(monkeypatch):
    parts = ["one\r", "\ntw", "o\u2028\x0b\x85 th", "ree\n", "\n", "four\r"]
    assert list(lines(iter(parts), "a")) == ["one\r\n", "two\u2028\x0b\x85 three\n", "\n", "four\r"]
    monkeypatch.setattr(decoding, "LINE_CHARACTERS", 5)
    with pytest.raises(DataError, match="line 2 of a has more than 5 characters"):
        list(lines(iter(["12\n", "123", "456"]), "a"))
