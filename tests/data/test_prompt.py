import shlex

import numpy as np
import pytest

from tf_dist.data.prompt import example_prompt, read_prompts, start_of_text
from tf_dist.data.tokenizer import train_tokenizer
from tf_dist.errors import DataError


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("河很宽,船很小。河很宽,船很小。", "河很宽,船很小。河很宽,"),
        ("1: 'tis said\n", "said"),
        ("--flag -o\n\t", "--flag"),
        ("\x1b[31mred\x07 \x00\n", ""),
        (" \n\t", ""),
        ("ro\u0301le", "ro\u0301le"),
    ],
)
def test_example_prompt_is_one_that_the_tokenizer_has(kind, text, prompt):
    tokenizer = train_tokenizer(kind, [text], 0)
    found = example_prompt(tokenizer, tokenizer.encode(text).astype("<u2"))
    assert found == prompt
    assert shlex.split(f"--prompt={shlex.quote(found)}") == [f"--prompt={found}"]
    if found:
        assert tokenizer.decode(tokenizer.encode(found)) == found


def test_no_prompt_from_half_a_character():
    tokenizer = train_tokenizer("byte", [])
    assert example_prompt(tokenizer, np.frombuffer("河".encode()[1:] + b" ok", np.uint8)) == "ok"
    assert example_prompt(tokenizer, np.empty(0, np.uint8)) == ""
    assert example_prompt(tokenizer, np.array([tokenizer.end_of_text] * 9)) == ""


def test_start_of_text():
    lines = train_tokenizer("char", ["one\ntwo"])
    assert lines.decode(start_of_text(lines)) == "\n"
    none = train_tokenizer("char", ["one two"])
    assert start_of_text(none).tolist() == [none.end_of_text]


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("the fox\nZwölf \r\n  [\nlast".encode())
    assert read_prompts(path) == [(1, "the fox"), (2, "Zwölf "), (3, "  ["), (4, "last")]


def test_prompts_of_json_lines_may_have_line_feeds(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a\\nb"\n{"prompt": "c", "other": 1}\n')
    assert read_prompts(path) == [(1, "a\nb"), (2, "c")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "has no prompts"),
        ("a.txt", b"one\n\nthree\n", "line 2 is empty"),
        ("a.txt", b"one\n\xff\n", "line 2 is not UTF-8"),
        ("a.txt", b"x" * (1 << 20) + b"\n", "line 1 is too long"),
        ("a.jsonl", b'"a"\n{"text": "b"}\n', "line 2 is empty, or no prompt"),
        ("a.jsonl", b'"a"\n3\n', "line 2 is empty, or no prompt"),
        ("a.jsonl", b"one\n", "line 1 is not JSON"),
    ],
)
def test_a_bad_file_of_prompts_is_one_message(tmp_path, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        read_prompts(path)
    assert name in str(error.value)


def test_a_file_of_prompts_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"cannot read prompts.*nothing\.txt"):
        read_prompts(tmp_path / "nothing.txt")
