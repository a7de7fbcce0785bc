"""Flags of ``generate``: which strategy, which prompts, and a line of JSON for each of several."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from tf_dist.cli import generate
from tf_dist.data.tokenizer import ByteTokenizer
from tf_dist.decoding.beam_search import BeamSearch
from tf_dist.decoding.forward import WindowForward
from tf_dist.decoding.sampling import Sampling
from tf_dist.errors import DataError, UsageError

V = 257  # bytes, and the end of text
RUN = SimpleNamespace(tokenizer=ByteTokenizer(), config=SimpleNamespace(vocab_size=V, seq_len=32))


def strategy(*words):
    return generate.strategy_of(generate.parse(list(words)))


def test_strategies():
    assert strategy() == Sampling(temperature=0.8, top_k=0, top_p=1.0, seed=1)
    assert strategy("--temperature", "0", "--seed", "3") == Sampling(temperature=0.0, seed=3)
    assert strategy("--beams", "3") == BeamSearch(3, 0.6)
    assert strategy("--beams", "2", "--length-penalty", "0") == BeamSearch(2, 0.0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--beams", "2", "--seed", "1", "--top-k", "4"], "leave out --top-k, --seed"),
        (["--length-penalty", "1"], "add --beams"),
        (["--beams", "0"], "beams >= 1"),
        (["--temperature", "-1"], "temperature >= 0"),
    ],
)
def test_flags_that_do_not_go_together(words, said):
    with pytest.raises(UsageError, match=said):
        strategy(*words)


def test_prompts(tmp_path):
    path = tmp_path / "many.txt"
    path.write_text("a\nb\n")
    assert generate.prompts_of(generate.parse([])) == [("--prompt", None)]
    assert generate.prompts_of(generate.parse(["--prompt", "a", "--prompt", "b"])) == [
        ("--prompt", "a"), ("--prompt", "b"),
    ]  # fmt: skip
    found = generate.prompts_of(generate.parse(["--prompts", str(path)]))
    assert found == [(f"{path}, line 1", "a"), (f"{path}, line 2", "b")]
    with pytest.raises(UsageError, match="leave one out"):
        generate.check_prompts(generate.parse(["--prompts", str(path), "--prompt", "a"]))


def test_a_prompt_that_cannot_be_encoded_is_named_by_its_line():
    class Latin(ByteTokenizer):
        def encode(self, text):
            raise DataError("no such character")

    run = SimpleNamespace(tokenizer=Latin(), config=RUN.config)
    with pytest.raises(DataError, match=r"^p\.txt, line 3: no such character"):
        generate.encoded(run, "a", "p.txt, line 3")
    with pytest.raises(DataError, match=r"^no such character"):
        generate.encoded(run, "a", "--prompt")


def test_a_line_of_json_for_each_prompt_in_their_order(capsys):
    """A model that writes the next letter, and ends after z."""

    def logits_at(x_BxT, place_B):
        last_B = x_BxT[np.arange(len(x_BxT)), place_B]
        logits_BxV = np.zeros((len(x_BxT), V), np.float32)
        logits_BxV[np.arange(len(x_BxT)), np.where(last_B == ord("z"), 256, last_B + 1)] = 50.0
        return logits_BxV

    flags = generate.parse(["--tokens", "4", "--batch", "2", "--progress", "none"])
    texts = ["a", "x", "é b"]
    prompts = [generate.encoded(RUN, text, "--prompt") for text in texts]
    for how in (Sampling(temperature=0), BeamSearch(2)):
        forward = WindowForward(logits_at, 32)
        assert generate.write_lines(RUN, forward, texts, prompts, how, flags) == 0
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [row["prompt"] for row in rows] == texts
        assert [row["text"] for row in rows] == ["bcde", "yz", "cdef"]
        assert [row["tokens"] for row in rows] == [4, 2, 4]
        assert [row["ended"] for row in rows] == [False, True, False]
        assert all(row["log_probability"] == pytest.approx(0, abs=1e-5) for row in rows)
