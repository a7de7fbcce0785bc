import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.data import tokenizer as tokenizer_module
from tf_dist.data.tokenizer import END_OF_TEXT, CharTokenizer, load_tokenizer, train_tokenizer
from tf_dist.errors import DataError, UsageError

WORDS = ["to be or not to be", "that is the question: be é \n\n 漢字", "😀 not  the\tquestion\r\n"] * 3
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module", params=["byte", "char", "bpe"])
def tokenizer(request):
    return train_tokenizer(request.param, WORDS, 300 if request.param == "bpe" else 0)


def test_round_trip_and_one_by_one_as_in_a_batch(tokenizer):
    batch = tokenizer.encode_batch(WORDS)
    assert [tokenizer.decode(ids) for ids in batch] == WORDS
    for text, ids in zip(WORDS, batch, strict=True):
        assert ids.dtype == np.uint32
        assert ids.tolist() == tokenizer.encode(text).tolist()
        assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert tokenizer.encode("").shape == (0,)


@settings(deadline=None, max_examples=40)
@given(text=texts)
def test_any_text_round_trips(text):
    for kind in ("byte", "bpe"):
        tokenizer = trained(kind)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    if text:
        assert train_tokenizer("char", [text]).decode(train_tokenizer("char", [text]).encode(text)) == text


TRAINED = {}


def trained(kind):
    return TRAINED.setdefault(kind, train_tokenizer(kind, WORDS, 0))


def test_end_of_text_decodes_to_nothing_and_is_never_the_id_of_text(tokenizer):
    ids = [tokenizer.end_of_text, *tokenizer.encode("to be"), tokenizer.end_of_text]
    assert tokenizer.decode(ids) == "to be"
    if tokenizer.kind != "char":
        spelt = tokenizer.encode(END_OF_TEXT)
        assert tokenizer.end_of_text not in spelt.tolist()
        assert tokenizer.decode(spelt) == END_OF_TEXT


def test_saved_and_loaded(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    facts = ("kind", "vocab_size", "end_of_text")
    assert [getattr(loaded, name) for name in facts] == [getattr(tokenizer, name) for name in facts]
    assert [ids.tolist() for ids in loaded.encode_batch(WORDS)] == [
        ids.tolist() for ids in tokenizer.encode_batch(WORDS)
    ]
    loaded.save(path)  # over an old file
    assert os.listdir(tmp_path) == ["tokenizer.json"]
    if tokenizer.kind != "char":
        assert END_OF_TEXT in loaded.decode(loaded.encode(END_OF_TEXT))


def test_training_is_deterministic(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "one.json")
    vocab_size = 300 if tokenizer.kind == "bpe" else 0
    train_tokenizer(tokenizer.kind, iter(WORDS), vocab_size).save(tmp_path / "two.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()


def test_ids_are_as_documented():
    assert train_tokenizer("byte", []).encode("é").tolist() == [0xC3, 0xA9]
    assert train_tokenizer("byte", []).end_of_text == 256
    char = train_tokenizer("char", ["cab", "a"])
    assert (char.encode("abc").tolist(), char.end_of_text, char.vocab_size) == ([1, 2, 3], 0, 4)


def test_broken_utf8_becomes_replacement_characters():
    assert trained("byte").decode([0x61, 0xC3, 0x62]) == "a\ufffdb"
    bpe = trained("bpe")
    assert bpe.decode(bpe.encode("é")[:1]) in ("é", "\ufffd")


@pytest.mark.parametrize(("kind", "size", "least"), [("byte", 256, 257), ("bpe", 256, 257), ("char", 3, 4)])
def test_vocabulary_too_small(kind, size, least):
    with pytest.raises(UsageError, match=f"the least is {least}") as caught:
        train_tokenizer(kind, ["abc"], size)
    assert caught.value.exit_code == 64
    assert train_tokenizer(kind, ["abc"], least).vocab_size == least
    train_tokenizer(kind, ["abc"], None)


def test_unknown_kind_and_no_text():
    with pytest.raises(UsageError, match="unknown tokenizer 'word'"):
        train_tokenizer("word", ["abc"])
    with pytest.raises(DataError, match="no text"):
        train_tokenizer("char", [])


def test_unknown_character():
    with pytest.raises(DataError, match=r"'é' \(U\+00E9, character 4 of the text, line 2\)") as caught:
        CharTokenizer("abc\n").encode("abc\né")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("ids", [[300], [-1]])
def test_ids_outside_the_vocabulary(ids):
    with pytest.raises(DataError, match="outside this tokenizer's vocabulary of 257"):
        trained("byte").decode(ids)


def hugging_face(path, special):
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(special)
    inner.enable_truncation(1)
    inner.enable_padding(length=5)
    inner.save(str(path))


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "[SEP]", "<eos>"])
def test_a_tokenizer_of_others(tmp_path, name):
    hugging_face(tmp_path / "t.json", [name])
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_text) == ("wordlevel", 4, 3)
    # Its truncation and padding are for other uses.
    assert tokenizer.encode("a b a").tolist() == [0, 1, 0]


def test_a_tokenizer_without_an_end(tmp_path):
    hugging_face(tmp_path / "t.json", ["<start>"])
    with pytest.raises(UsageError, match="no end-of-text token") as caught:
        load_tokenizer(tmp_path / "t.json")
    assert caught.value.exit_code == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "not JSON"),
        ("[1]", "not an object"),
        ("{}", "not a tokenizer"),
        ("[" * 100_000, "not JSON"),
        (json.dumps({"format": "other"}), "this version reads"),
        (json.dumps({"format": "tf_dist tokenizer 1", "kind": "char", "characters": 3}), "damaged"),
        (json.dumps({"format": "tf_dist tokenizer 1", "kind": "char", "characters": ""}), "damaged"),
    ],
)
def test_not_a_tokenizer(tmp_path, content, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)


def test_no_tokenizer_file(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        load_tokenizer(tmp_path / "none.json")


@pytest.mark.parametrize("sign", ["ACGT", "河船水石橋", " ", "\n "])
def test_bpe_of_text_without_spaces(sign):
    text = "".join(sign[(number * number) % 7 % len(sign)] for number in range(5000))
    runs = list(tokenizer_module._in_short_runs([text, "plain words", ""]))
    assert "".join(runs) == text + "plain words"
    assert max(map(len, runs)) == 512
    made = train_tokenizer("bpe", [text], 300)
    assert made.decode(made.encode(text)) == text
    assert len(made.encode(text)) < len(text)


def test_bpe_of_ordinary_text_is_what_it_was():
    documents = ["some words to count, and " + "=" * 400 + "\n", "def f(x):\n    return x\n"]
    assert list(tokenizer_module._in_short_runs(documents)) == documents


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_text_of_bytes_that_are_no_utf8(kind):
    made = train_tokenizer(kind, ["caf\xe9"])
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9, character 3 of 'caf\\udce9'"):
        made.encode(os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match="half of a surrogate pair"):
        made.encode("\ud800")


def test_pointer_in_place_of_a_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n")
    with pytest.raises(DataError, match="git lfs pull"):
        load_tokenizer(path)
