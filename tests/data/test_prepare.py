import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tf_dist.data import corpus as corpus_module
from tf_dist.data import prepare as prepare_function
from tf_dist.data import prepared_dataset as prepared_module
from tf_dist.data.corpus import Corpus
from tf_dist.data.prepared_dataset import files_changed, find_prepared, open_prepared
from tf_dist.data.tokenizer import train_tokenizer
from tf_dist.errors import DataError, UsageError

ROOT = Path(__file__).resolve().parents[2]
prepare_module = sys.modules["tf_dist.data.prepare"]


def texts(folder, *contents):
    folder.mkdir(exist_ok=True)
    for number, content in enumerate(contents):
        (folder / f"{number:03}.txt").write_text(content, encoding="utf-8", newline="")
    return str(folder)


def run(tmp_path, source, **options):
    options = {"tokenizer": "byte", **options}
    return prepare_function((source,), folder=tmp_path / "prepared", **options)


def only(tmp_path):
    """The one prepared folder; nothing else may be left."""
    (folder,) = [path for path in (tmp_path / "prepared").iterdir() if path.name != ".lock"]
    return folder


def test_documents_are_joined_by_end_of_text(tmp_path):
    contents = [f"document {number} é" for number in range(10)]
    done = run(tmp_path, texts(tmp_path / "t", *contents), val_fraction=0.2)
    read = []
    for side in (done.train, done.val):
        pieces = "".join(chr(256) if token == 256 else chr(token) for token in side)
        assert pieces.endswith(chr(256))
        read.append([piece.encode("latin-1").decode() for piece in pieces[:-1].split(chr(256))])
    assert sorted(read[0] + read[1]) == contents
    assert [len(side) for side in read] == [8, 2]
    assert done.meta["documents"] == {"train": 8, "val": 2}
    assert done.meta["text_bytes"] == {"train": 8 * 13, "val": 2 * 13}
    assert done.meta["tokens"] == {"train": 8 * 14, "val": 2 * 14}
    assert (done.meta["dtype"], done.meta["split"]) == ("uint16", "document")
    assert re.fullmatch("t-[0-9a-f]{12}", done.path.name)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_one_document_is_cut_and_gets_no_end(tmp_path, told, tokenizer):
    text = "To be, or not to be: é! " * 50
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    done = run(tmp_path, str(tmp_path / "one.txt"), tokenizer=tokenizer)
    at = int(len(text) * 0.9)
    assert done.tokenizer.decode(done.train) == text[:at]
    assert done.tokenizer.decode(done.val) == text[at:]
    assert done.tokenizer.end_of_text not in [*done.train, *done.val]
    assert done.meta["split"] == "position"
    assert done.meta["documents"] == {"train": 1, "val": 1}
    assert any(f"first {at:,} characters" in line for line in told.messages)


@pytest.mark.parametrize("contents", [["a" * 30], ["a" * 30, "b" * 5]])
def test_no_validation(tmp_path, contents):
    done = run(tmp_path, texts(tmp_path / "t", *contents), val_fraction=0)
    assert done.val.shape == (0,)
    assert len(done.train) == sum(map(len, contents)) + (len(contents) if len(contents) > 1 else 0)
    assert (done.meta["split"], done.meta["documents"]["val"]) == ("none", 0)


def test_pieces_of_long_documents_give_the_same_tokens(monkeypatch, tmp_path):
    text = "".join(f"line {number} of\n\n  it, and on\n" for number in range(300))
    source = texts(tmp_path / "t", text, text[::-1])
    whole = run(tmp_path, source, tokenizer="bpe", vocab_size=300)
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 200)
    monkeypatch.setattr(prepare_module, "BATCH_CHARACTERS", 500)
    other = prepare_function((source,), tokenizer="bpe", vocab_size=300, folder=tmp_path / "q")
    assert other.meta["content_sha256"] == whole.meta["content_sha256"]
    one = tmp_path / "t" / "000.txt"
    cut = prepare_function((str(one),), tokenizer="byte", folder=tmp_path / "q")
    assert cut.tokenizer.decode(cut.train) + cut.tokenizer.decode(cut.val) == text


def test_found_again_and_made_anew_when_a_file_or_option_changes(tmp_path):
    source = texts(tmp_path / "t", "aaa", "bbb", "ccc")
    first = run(tmp_path, source)
    made = (first.path / "meta.json").stat().st_mtime_ns
    again = run(tmp_path, source)
    assert again.path == first.path
    assert (again.path / "meta.json").stat().st_mtime_ns == made
    assert run(tmp_path, source, seed=2).path != first.path
    assert run(tmp_path, source, vocab_size=300).path != first.path
    os.utime(tmp_path / "t" / "000.txt", ns=(1, 1))
    assert run(tmp_path, source).path != first.path


@pytest.mark.parametrize("victim", ["train.bin", "val.bin", "meta.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_folder_is_made_again(tmp_path, told, victim, damage):
    source = texts(tmp_path / "t", "aaa", "bbb", "ccc")
    first = run(tmp_path, source)
    digest = first.meta["content_sha256"]
    path = first.path / victim
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    else:
        path.unlink()
    with pytest.raises(DataError):
        open_prepared(first.path)
    told.clear()
    again = run(tmp_path, source)
    assert "preparing again" in told.messages[0]
    assert (again.path, again.meta["content_sha256"]) == (first.path, digest)
    assert only(tmp_path) == first.path


def test_two_at_once(tmp_path):
    source = texts(tmp_path / "t", *["some words to count"] * 20)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: run(tmp_path, source), range(8)))
    assert len({one.path for one in done}) == 1
    assert len({one.meta["content_sha256"] for one in done}) == 1
    assert all(len(one.train) + len(one.val) == 20 * 20 for one in done)
    only(tmp_path)


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    source = texts(tmp_path / "t", "aaa", "bbb")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_module.TokenWriter, "append", full)
    with pytest.raises(DataError, match=r"No space left on device\. Choose another --prepared-dir") as caught:
        run(tmp_path, source)
    assert caught.value.exit_code == 65
    assert list((tmp_path / "prepared").iterdir()) == []


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "prepared").write_text("a file")
    with pytest.raises(DataError, match="cannot write prepared tokens"):
        run(tmp_path, texts(tmp_path / "t", "aaa", "bbb"))


def test_corpus_that_changes_meanwhile(tmp_path, monkeypatch):
    source = texts(tmp_path / "t", "aaa", "bbb")

    def plan(*args):
        made = original(*args)
        texts(tmp_path / "t", "a longer text than before")
        return made

    original = prepare_module._plan
    monkeypatch.setattr(prepare_module, "_plan", plan)
    with pytest.raises(DataError, match="changed"):
        run(tmp_path, source)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"val_fraction": 1.0}, UsageError, "val_fraction is 1.0"),
        ({"errors": "ignore"}, UsageError, "strict or replace"),
        ({"vocab_size": 100}, UsageError, "the least is 257"),
        ({"tokenizer": "bpe", "vocab_size": 100}, UsageError, "the least is 257"),
        ({"tokenizer": "char", "vocab_size": 2}, UsageError, "the least is 4"),
        ({"tokenizer": "none.json"}, DataError, "no tokenizer 'none.json'"),
    ],
)
def test_refuses(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, texts(tmp_path / "t", "abc", "cba"), **options)


def test_too_short_to_cut(tmp_path):
    with pytest.raises(DataError, match=r"length 1: too short to split\. Use --val-fraction 0"):
        run(tmp_path, texts(tmp_path / "t", "a"))


def test_own_tokenizer_by_path(tmp_path):
    source = texts(tmp_path / "t", "abc", "cab", "abé")
    train_tokenizer("char", ["abcé"]).save(tmp_path / "full.json")
    train_tokenizer("char", ["abc"]).save(tmp_path / "less.json")
    done = run(tmp_path, source, tokenizer=str(tmp_path / "full.json"))
    assert (done.meta["tokenizer_kind"], done.meta["vocab_size"]) == ("char", 5)
    with pytest.raises(DataError, match=r"t/002\.txt: character 'é' .*character 2 of the text, line 1"):
        run(tmp_path, source, tokenizer=str(tmp_path / "less.json"))
    with pytest.raises(UsageError, match="the least is 5"):
        run(tmp_path, source, tokenizer=str(tmp_path / "full.json"), vocab_size=4)


META_CHANGES = [
    ("version", 1, "this program reads"),
    ("format", "x", "this program reads"),
    ("dtype", "float64", "dtype"),
    ("tokens", {"train": -1, "val": 0}, "tokens"),
    ("tokens", {"train": True, "val": 0}, "tokens"),
    ("tokens", {"train": 1, "val": 0}, "holds 12 tokens"),
    ("tokens", {"train": 1, "val": 0, "test": 0}, "tokens"),
    ("skipped", {"nulls": 0, "empty": 0, "not_utf8": 0}, "skipped"),
    ("val_fraction", float("nan"), "val_fraction"),
    ("key", "0" * 64 + "\n", "key"),
    ("seed", True, "seed"),
    ("vocab_size", 0, "vocab_size"),
    ("vocab_size", 300, "differ in vocab_size"),
    ("content_sha256", "zz", "content_sha256"),
    ("files_sha256", None, "files_sha256"),
    ("sample_sha256", {"train": "0" * 64}, "sample_sha256"),
    ("sample_sha256", {"train": "0" * 64, "val": "0" * 64}, "have changed since they were prepared"),
    ("tokenizer_sha256", "0" * 64, "not the tokenizer of these tokens"),
    ("sources", "t", "sources"),
    ("unknown", 1, "unknown"),
]


@pytest.mark.parametrize(("key", "value", "message"), META_CHANGES)
def test_meta_is_checked(tmp_path, key, value, message):
    folder = run(tmp_path, texts(tmp_path / "t", "aaa", "bbb", "ccc", "ddd"), val_fraction=0.25).path
    meta = json.loads((folder / "meta.json").read_text())
    for changed in ({**meta, key: value}, {name: fact for name, fact in meta.items() if name != key}):
        if changed == meta:  # the key that is unknown, taken away again
            continue
        (folder / "meta.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=message if key in changed else r"meta\.json"):
            open_prepared(folder)


@pytest.mark.parametrize("content", ["", "[]", "nonsense", "[" * 100_000])
def test_meta_that_is_none(tmp_path, content):
    folder = run(tmp_path, texts(tmp_path / "t", "aaa", "bbb")).path
    (folder / "meta.json").write_text(content)
    with pytest.raises(DataError, match=r"meta\.json"):
        open_prepared(folder)


def test_tokens_that_change_under_a_run(tmp_path):
    made = run(tmp_path, texts(tmp_path / "t", "aaa", "bbb", "ccc", "ddd"), val_fraction=0.25)
    made.check_unchanged()
    made.verify()
    path = made.path / "train.bin"
    raw = path.read_bytes()
    os.utime(path, ns=(1, 1))
    made.check_unchanged()  # touched, and no more
    beside = made.path / "new"
    beside.write_bytes(raw[::-1])
    os.replace(beside, path)
    made.check_unchanged()  # another file: what is mapped is still there
    assert made.train.tobytes() == raw
    with pytest.raises(DataError, match="have changed since they were prepared"):
        made.verify()  # who opens it now must not go on with it
    path.write_bytes(raw)
    made.check_unchanged()
    with path.open("r+b") as file:
        file.write(bytes([raw[0] ^ 1]))
    with pytest.raises(DataError, match=r"somebody has written to train\.bin") as caught:
        made.check_unchanged()
    assert caught.value.exit_code == 65
    path.unlink()
    made.check_unchanged()
    with pytest.raises(DataError, match="cannot read"):
        made.verify()


def test_huge_meta_is_not_read(tmp_path, monkeypatch):
    folder = run(tmp_path, texts(tmp_path / "t", "aaa", "bbb")).path
    monkeypatch.setattr(prepared_module, "META_LIMIT_BYTES", 10)
    with pytest.raises(DataError, match="larger than 10 bytes"):
        open_prepared(folder)


def test_stdlib(tmp_path):
    done = run(tmp_path, "stdlib", max_bytes=100_000)
    assert done.meta["sources"] == ["stdlib"]
    total = sum(done.meta["text_bytes"].values())
    assert 50_000 < total <= 100_000
    assert total == sum(len(text.encode()) for text in Corpus(["stdlib"], max_bytes=100_000))


def test_tinyshakespeare_as_nanogpt_splits_it(tmp_path):
    default = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    path = Path(os.environ.get("TF_DIST_TINYSHAKESPEARE", default))
    if not path.is_file():
        pytest.skip(f"no {path}: set TF_DIST_TINYSHAKESPEARE to the file to run this test")
    done = run(tmp_path, str(path), tokenizer="char")
    assert (len(done.train), len(done.val), done.tokenizer.vocab_size) == (1_003_854, 111_540, 66)
    assert np.bincount(done.train, minlength=66)[0] == 0


def script(tmp_path, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "scripts" / "prepare.py"), *map(os.fspath, arguments)]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


def test_script(tmp_path):
    samples = [ROOT / "data" / "samples" / name for name in ("notes.csv", "poems.txt")]
    done = script(tmp_path, "--data", *samples, "--tokenizer", "byte")
    assert (done.returncode, done.stderr) == (0, "")
    folder = tmp_path / "data" / "prepared"
    (made,) = folder.glob("notes-*")
    assert str(made.relative_to(tmp_path)) in done.stdout
    assert "nulls: 1" in done.stdout
    assert open_prepared(made).meta["documents"] == {"train": 4, "val": 1}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "none.txt"], 65, "error: no such file or folder: none.txt"),
        (["tinyshakspeare"], 65, "Did you mean tinyshakespeare?"),
        (["--val-fraction", "2"], 64, "error: val_fraction is 2.0"),
        (["--vocab-size", "many"], 64, "error: argument --vocab-size"),
    ],
)
def test_script_errors_are_one_line(tmp_path, arguments, code, message):
    done = script(tmp_path, *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_names_that_are_no_utf8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    with open(os.path.join(folder, b"r\xe9sum\xe9.txt"), "wb") as file:
        file.write(b"the river is wide")
    source = os.fsdecode(os.path.join(folder, b"r\xe9sum\xe9.txt"))
    done = run(tmp_path, source)
    assert done.meta["sources"] == [source]
    assert open_prepared(done.path).meta == done.meta
    assert run(tmp_path, os.fsdecode(folder)).train.tolist() == done.train.tolist()
    ended = script(tmp_path, "--data", os.fsencode(source), "--tokenizer", "byte")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_unknown_character_is_where_the_message_says(monkeypatch, tmp_path):
    monkeypatch.setattr(corpus_module, "CHUNK_CHARACTERS", 100)
    train_tokenizer("char", [" \nabcdefghijklmnopqrstuvwxyz0123456789"]).save(tmp_path / "few.json")
    text = "".join(f"line {number}\n" for number in range(100))
    at = text.index("line 70") + 4
    (tmp_path / "a.txt").write_text(text[:at] + "é" + text[at:], encoding="utf-8")
    for fraction in (0.0, 0.1, 0.5):
        with pytest.raises(
            DataError, match=rf"a\.txt: character 'é' .*character {at} of the text, line 71\)"
        ):
            run(
                tmp_path, str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "few.json"), val_fraction=fraction
            )
    rows = ['{"text": "abc"}', '{"text": null}', '{"text": ""}', "", '{"text": "aé"}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"row 4 of .*a\.jsonl \(line 5\): character 'é' .*character 1 of"):
        run(tmp_path, str(tmp_path / "a.jsonl"), tokenizer=str(tmp_path / "few.json"))


@pytest.mark.parametrize("side", ["train", "val"])
def test_other_tokens_beside_the_same_facts(tmp_path, told, side):
    source = texts(tmp_path / "t", "aaa", "bbb", "ccc", "ddd")
    first = run(tmp_path, source, val_fraction=0.25)
    path = first.path / f"{side}.bin"
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"the tokens in .* have changed .* {side}\.bin") as caught:
        open_prepared(first.path)
    assert str(first.path.absolute()) in str(caught.value)
    told.clear()
    again = run(tmp_path, source, val_fraction=0.25)
    assert "have changed since they were prepared" in told.messages[0]
    assert again.path == first.path
    again.verify()


def test_tokens_are_found_by_what_they_are(tmp_path):
    source = texts(tmp_path / "t", "abc abd", "bca", "cab", "dab")
    made = run(tmp_path, source, tokenizer="bpe", vocab_size=260)
    folder, digests = made.path.parent, (made.meta["content_sha256"], made.meta["tokenizer_sha256"])
    assert find_prepared(folder, *digests).path == made.path
    # Asked for by its tokenizer's file and actual size, as config.yaml has them: another key, equal tokens.
    made.tokenizer.save(tmp_path / "tokenizer.json")
    same = run(
        tmp_path, source, tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=made.tokenizer.vocab_size
    )
    assert same.path != made.path
    assert (same.meta["content_sha256"], same.meta["tokenizer_sha256"]) == digests
    assert find_prepared(folder, digests[0], "0" * 64) is None
    assert find_prepared(folder, "0" * 64, digests[1]) is None
    assert find_prepared(tmp_path / "nowhere", *digests) is None
    for one in (made, same):
        (one.path / "meta.json").write_text("damaged")
    assert find_prepared(folder, *digests) is None


def test_files_that_have_changed_since(tmp_path):
    source = texts(tmp_path / "t", "aaa", "bbb", "ccc")
    made = run(tmp_path, source)
    assert files_changed(made, 0) == ""
    texts(tmp_path / "t", "aaa", "bbb", "ccc", "more")
    assert files_changed(made, 0) == f"the corpus has changed ({source}: other sizes or times)"
    for path in (tmp_path / "t").iterdir():
        path.unlink()
    assert "cannot be read any more" in files_changed(made, 0)


def test_what_is_left_out_is_said(tmp_path, told):
    source = texts(tmp_path / "t", "aaa", "bbb", "")
    for name in ("a.pdf", "b.PDF", "c.tar.gz", "README", ".hidden.pdf"):
        (tmp_path / "t" / name).write_bytes(b"x")
    (tmp_path / "t" / "bad.txt").write_bytes(b"ccc \xff\xff")
    run(tmp_path, source, errors="replace")
    said = told.messages
    assert "files of other suffixes, passed over: 2 .pdf, 1 without one, 1 .tar.gz" in said
    assert "documents without text, left out: 1" in said
    assert "bytes that are not UTF-8, now U+FFFD: in 2 places" in said
