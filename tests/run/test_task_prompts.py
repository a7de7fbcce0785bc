"""Prompts of tasks: texts, tables and files; rows without a target; places of what cannot be used."""

import json
import wave

import numpy as np
import pytest

from tf_dist.config import Config
from tf_dist.data.tokenizer import train_tokenizer
from tf_dist.errors import DataError, UsageError
from tf_dist.run.task_predictor import TaskPredictor
from tf_dist.run.task_prompts import predicted, records_of_file, records_of_prompts
from tf_dist.tasks.registry import task_of

BYTE = train_tokenizer("byte", [], 0)
LETTERS = train_tokenizer("char", ["abc "], 0)
LABELS = ["no", "yes"]


def task(**options):
    return task_of(Config(tokenizer="byte", **options))


class ByFirstByte:
    """A model whose class of a row is that of its first token, modulo 2; of frames, all that end at once."""

    gathers_weights = False

    def __init__(self, frames=None):
        self.frames, self.asked = frames, []

    def outputs(self, x_BxW):
        self.asked.append(len(x_BxW))
        if self.frames:
            return np.ones((len(x_BxW), *self.frames), np.float32)
        return np.eye(2, dtype=np.float32)[x_BxW[:, :1] % 2]


def answers(made, records, tokenizer=BYTE, batch=2, folder=None, model=None):
    predictor = TaskPredictor(made, tokenizer, LABELS)
    return list(predicted(made, tokenizer, predictor, model or ByFirstByte(), records, batch, folder))


def test_texts_in_their_order_and_in_full_batches():
    made, model = task(task="classify", seq_len=4), ByFirstByte()
    found = answers(made, records_of_prompts(made, ["a", "b", "c"]), model=model)
    assert found == [({"text": "a"}, "yes"), ({"text": "b"}, "no"), ({"text": "c"}, "yes")]
    assert model.asked == [2, 2], "a batch of another size is another program"


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.txt"])
def test_files(tmp_path, name):
    """Tables need no column of labels; other files are a prompt a line."""
    texts = {
        "rows.csv": "body,n\nab,1\nba,2\n",
        "rows.jsonl": '{"body": "ab"}\n{"body": "ba"}\n',
        "rows.txt": "ab\nba\n",
    }
    (tmp_path / name).write_text(texts[name])
    made = task(task="classify", text_column="body", seq_len=4)
    found = answers(made, records_of_file(made, tmp_path / name))
    assert found == [({"text": "ab"}, "yes"), ({"text": "ba"}, "no")]


def test_an_answer_has_a_context_and_a_question(tmp_path):
    made = task(task="answer", seq_len=32)
    with pytest.raises(
        UsageError, match=r"reads context and question.*FILE\.jsonl with context, question in"
    ):
        records_of_prompts(made, ["what?"])
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"context": "one two three", "question": "which?"}) + "\n")

    class Second:
        gathers_weights = False

        def outputs(self, x_BxW):
            start = len("which?") + 1 + len("one")
            scores = np.zeros((len(x_BxW), 2, x_BxW.shape[1]), np.float32)
            scores[:, 0, start] = scores[:, 1, start + 3] = 9
            return scores

    ((given, text),) = answers(made, records_of_file(made, path), model=Second())
    assert (given["question"], text) == ("which?", "two")


def test_speech_is_a_file_for_each_text(tmp_path):
    made = task(task="speak", source_len=4, target_len=3, sample_rate=8000, mels=4, stack_frames=2)
    model = ByFirstByte(frames=(3, made.target.width))
    found = answers(made, records_of_prompts(made, ["a", "b", "c"]), folder=tmp_path / "out", model=model)
    paths = [str(tmp_path / "out" / f"0000{n}.wav") for n in range(3)]
    assert found == [({"source": text}, path) for text, path in zip("abc", paths, strict=True)]
    with wave.open(paths[2]) as file:
        assert file.getframerate() == 8000 and file.getnframes() > 0


def test_a_recording_may_be_anywhere_and_must_be_one(tmp_path):
    made = task(task="transcribe", source_len=4, target_len=3)
    (record,) = records_of_prompts(made, [str(tmp_path / "a.wav")])
    with pytest.raises(DataError, match=r"a\.wav"):
        made.sources([record], BYTE)


def test_what_cannot_be_used_is_named_by_its_place(tmp_path, told):
    made = task(task="classify", seq_len=4)
    with pytest.raises(UsageError, match="--batch is 0"):
        answers(made, records_of_prompts(made, ["a"]), batch=0)
    with pytest.raises(DataError, match=r"no labels\.json"):
        TaskPredictor(made, BYTE, []).texts(np.zeros((1, 1), np.int32), [{"text": "a"}])
    with pytest.raises(DataError, match="--prompt is empty"):
        records_of_prompts(made, ["a", " "])
    with pytest.raises(DataError, match=r"^--prompt: .*'x'"):
        answers(made, records_of_prompts(made, ["ab", "x"]), LETTERS)
    answers(made, records_of_prompts(made, ["abcdef"]))
    assert "--prompt: its last 2 are cut off: a source has 4 slots" in " ".join(told.messages)
