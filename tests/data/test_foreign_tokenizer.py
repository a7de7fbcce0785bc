"""Tokenizers of somebody else: used, or refused in one sentence; they neither hang nor panic."""

import json

import pytest
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models, pre_tokenizers, trainers

from tf_dist.data.foreign_tokenizer import endless
from tf_dist.data.tokenizer import load_tokenizer
from tf_dist.errors import DataError, UsageError

TEXT = "a" * 40 + "! " + "x" * 40 + " hello there"


@pytest.fixture(scope="module")
def plain():
    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["hello world"] * 10, trainer=trainer)
    return inner.to_str()


@pytest.fixture
def changed(plain, tmp_path):
    """``changed(change)``: the file of a sound tokenizer in which something was changed."""

    def make(change):
        fields = json.loads(plain)
        change(fields)
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
        return tmp_path / "tokenizer.json"

    return make


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


ODD = {
    "a pattern without end": lambda f: f.update(pre_tokenizer=split("^(a+)+$")),
    "another": lambda f: f.update(normalizer=replace({"Regex": "(x+x+)+y"}, "a")),
    "one in a sequence": lambda f: f.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split("(?:a|aa)*b")]}
    ),
    "an id beyond all models": lambda f: f["model"]["vocab"].update(zzzz=2_147_483_000),
    "an added one": lambda f: f["added_tokens"][0].update(id=4_000_000_000),
    "one below": lambda f: f["model"]["vocab"].update(zzzz=-1),
    "a table that is none": lambda f: f.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    ),
    "pieces of no length": lambda f: f.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "a million for one": lambda f: f.update(normalizer=replace({"String": "e"}, "e" * 1_000_000)),
    "a little, again and again": lambda f: f.update(
        normalizer={"type": "Sequence", "normalizers": [replace({"String": "e"}, "eeee")] * 9}
    ),
    "no unknown token": lambda f: f.update(
        model={"type": "WordPiece", "unk_token": "no", "continuing_subword_prefix": "##",
               "max_input_chars_per_word": 100, "vocab": {"<|endoftext|>": 0, "a": 1}}
    ),
    "an empty vocabulary": lambda f: f.update(model={"type": "Unigram", "unk_id": None, "vocab": []}),
    "merges of nothing": lambda f: f["model"].update(merges=[["nope", "nope"]]),
    "a model that is none": lambda f: f.update(model=3),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_used_is_said(changed, name):
    path = changed(ODD[name])
    with pytest.raises((DataError, UsageError)) as caught:
        load_tokenizer(path).encode(TEXT)
    assert len(str(caught.value)) < 1000


def test_a_sound_one_is_used(changed):
    tokenizer = load_tokenizer(changed(lambda fields: None))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("characters", ["a\ud800b", "", 3, None])
def test_characters_that_are_none(tmp_path, characters):
    fields = {"format": "tf_dist tokenizer 1", "kind": "char", "characters": characters}
    (tmp_path / "t.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="is damaged"):
        load_tokenizer(tmp_path / "t.json")


@pytest.mark.parametrize(
    "text", ['{"a":' * 100_000 + "1" + "}" * 100_000, "[1]", "{", '{"format": "' + "x" * 10**6 + '"}']
)
def test_files_that_are_no_tokenizer(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path / "t.json")
    assert len(str(caught.value)) < 1000


# As published: GPT-2, GPT-4, GPT-4o, DeepSeek, BLOOM (shortened).
PUBLISHED = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",  # noqa: E501
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+| ?[\p{P}\p{S}]+[\r\n]*|\s+(?!\S)|\s+""",
    r" ?[^(\s|[.,!?…。])]+",
    " {2,}",
    "(?:foo)+",
)


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_published_patterns_end(pattern):
    assert endless(pattern) == ""


@pytest.mark.parametrize(
    "pattern",
    ["^(a+)+$", "(x+x+)+y", "(a|a)+", "(a|aa)*b", "((a+))+", "(?:a*)*", "([a-z]+)*", "(?:a?){2,}", "(?i:a+)+", r"(\p{L}+)*"],  # noqa: E501
)  # fmt: skip
def test_patterns_that_may_not_end(pattern):
    assert endless(f"x{pattern}y")
