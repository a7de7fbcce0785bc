import shlex

import numpy as np
import pytest

from tf_dist.data.prompt import example_prompt, start_of_text
from tf_dist.data.tokenizer import train_tokenizer


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
