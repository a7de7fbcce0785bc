"""What a person sees of a training: rows that fit the terminal, a bar, and why there is no picture."""

import contextlib
import json
import sys

import pytest

from tf_dist import progress
from tf_dist.run.plots import loss_curve
from tf_dist.run.progress import SILENCE_S, Bar, NoProgress, RowLines, ShowSteps, display

ROW = {
    "step": 120, "loss": 3.25, "learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_s": 123456.0,
    "step_s": 0.0123, "comm_s": 0.001, "wait_s": 0.002,
}  # fmt: skip
VALIDATION = {"step": 120, "val_loss": 3.5, "perplexity": 33.1, "val_accuracy": 0.25, "bits_per_byte": 2.125}


@pytest.fixture
def columns(monkeypatch):
    return lambda number: monkeypatch.setattr(progress, "_width", number)


@pytest.mark.parametrize("width", [0, 50, 60, 80, 100, 132, 200])
def test_rows_fit_the_terminal(columns, width):
    columns(width)
    said = []
    RowLines(100_000, said.append)({**ROW, **VALIDATION})
    training, validation = said
    assert "loss 3.2500" in training and "validation loss 3.5000" in validation
    assert not width or max(map(len, said)) < width
    assert ("grad" in training) == (width in (0, 132, 200))
    assert width < 80 or ("left" in training and "tokens/s" in training)


def test_rows_that_are_far_apart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("tf_dist.run.progress.time.monotonic", lambda: now[0])
    said = []
    show = RowLines(100, said.append)
    show.step(1)
    now[0] += SILENCE_S + 1
    show.step(2)
    show.step(3)
    assert said == ["step      2/100  --:-- left"]
    now[0] += 1
    show(ROW | {"step": 4})
    now[0] += SILENCE_S - 1
    show.step(5)
    assert len(said) == 2


def test_a_bar_counts_steps_and_goes_away(monkeypatch):
    shown = []

    class Screen(progress.NoTask):
        def add(self, task):
            shown.append(task)

        def remove(self, task):
            shown.remove(task)

    monkeypatch.setattr(progress, "_shown", Screen())
    step = [49]
    show = display("bar", 100, print)
    assert isinstance(show, Bar)
    steps = ShowSteps(show, lambda: step[0])
    with contextlib.closing(steps):
        steps.on_train_begin()
        assert [task.title for task in shown] == ["compiling the first step"]
        for step[0] in (50, 51):
            steps.on_train_batch_end(0)
            show({**ROW, **VALIDATION})
        (bar,) = shown
        assert (bar.done, bar.total, bar.first) == (51, 100, 50)
        assert bar.title == "loss 3.250  123,456 tokens/s  val 3.500"
    assert not shown
    with pytest.raises(KeyError), contextlib.closing(steps):  # a death in the first step
        steps.on_train_begin()
        raise KeyError
    assert not shown


def test_what_a_kind_is():
    assert isinstance(display("none", 1, print), NoProgress)
    assert isinstance(display("plain", 1, print), RowLines)


# The picture ---------------------------------------------------------------------------------------


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2)))
    return path


def test_a_picture(metrics, tmp_path):
    assert loss_curve(metrics, tmp_path / "loss.png", "x") == ""
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_why_there_is_none(metrics, tmp_path, monkeypatch):
    picture = tmp_path / "loss.png"
    assert "no-folder" in loss_curve(metrics, tmp_path / "no-folder" / "loss.png", "x")
    empty = tmp_path / "empty.jsonl"
    assert "has no row with a loss" in loss_curve(empty, picture, "x")
    empty.write_text('{"step": 1, "loss": null}\n')
    assert "has no row with a loss" in loss_curve(empty, picture, "x")

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("matplotlib") and self.error is not None:
                raise self.error

    broken = Broken()
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [broken, *sys.meta_path])
    broken.error = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    assert "pip install matplotlib" in loss_curve(metrics, picture, "x")
    for broken.error, said in (
        (ModuleNotFoundError("No module named 'kiwisolver'", name="kiwisolver"), "kiwisolver"),
        (ImportError("libpng.so: cannot open shared object file"), "libpng.so"),
        (ValueError("'nonsense' is not a valid backend"), "nonsense"),
    ):
        found = loss_curve(metrics, picture, "x")
        assert said in found and "pip install matplotlib" not in found
    assert not picture.exists()
