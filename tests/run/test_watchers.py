"""Early stopping, reports elsewhere, and the user's callbacks."""

import csv
import importlib.util
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from tf_dist.config import Config
from tf_dist.errors import BackendMissing, UsageError
from tf_dist.run import reports
from tf_dist.run.early_stopping import StopEarly
from tf_dist.run.reports import Reports, check_installed, reports_of
from tf_dist.run.watchers import users_callbacks

ROWS = [
    {"step": 1, "loss": 3.0, "tokens": 8, "val_loss": None},
    {"step": 2, "loss": 2.0, "tokens": 16, "val_loss": 2.5, "val_accuracy": 0.5},
]


class Model:
    stop_training = False


def stopping(metric, patience, values, before=()):
    made = StopEarly(metric, patience, before)
    made.set_model(Model())
    for number, value in enumerate(values):
        made.on_epoch_end(number, {"val_loss": 1.0, metric: value})
        if made.model.stop_training:
            return number, made
    return None, made


@pytest.mark.parametrize(
    ("metric", "values", "ends"),
    [
        ("val_loss", [3, 2, 2.5, 2.1], 3),
        ("val_loss", [3, 2, 2.5, 1.9, 2], None),
        ("val_loss", [3, float("nan"), float("nan")], 2),
        ("val_chrf", [10, 20, 15, 19], 3),
        ("val_accuracy", [0.1, 0.2, 0.1, 0.2], 3),
        ("val_wer", [0.9, 0.5, 0.7, 0.6], 3),
    ],
)
def test_it_ends_after_so_many_validations_without_a_better_one(metric, values, ends):
    assert stopping(metric, 2, values)[0] == ends


def test_a_resumed_run_goes_on_counting():
    before = [{"val_loss": 2.0}, {"val_loss": None}, {"val_loss": 2.5}]
    ended, made = stopping("val_loss", 2, [2.4], before)
    assert (
        ended == 0 and made.over and str(made) == "val_loss has not been better than 2.0000 for 2 validations"
    )


def test_epochs_without_validation_do_not_count_and_a_wrong_name_is_said():
    made = StopEarly("val_blue", 1)
    made.set_model(Model())
    made.on_epoch_end(0, {"loss": 1.0})
    with pytest.raises(UsageError, match="validations have val_loss"):
        made.on_epoch_end(0, {"val_loss": 1.0})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"report_to": "tensorbord"}, "'tensorbord' is none of tensorboard, csv.*Did you mean 'tensorboard'"),
        ({"early_stopping": "val_loss"}, "METRIC:PATIENCE"),
        ({"early_stopping": "val_loss:0"}, "METRIC:PATIENCE"),
        ({"early_stopping": "val_loss:2", "eval_every": 0}, "nothing is validated"),
        ({"callbacks": "mine"}, "not package.module:function"),
        ({"label_smoothing": 1.0}, "leaves nothing of the target"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Config(**options)


def run_with(name, folder):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(whole(row)) + "\n" for row in ROWS))
    config = Config(report_to=name)
    check_installed(config)
    made = Reports(reports_of(config, folder))
    for row in ROWS:
        made.row(row)
    made.close()


def whole(row):
    from tf_dist.run.metrics_file import METRICS

    return {**dict.fromkeys(METRICS, 0), **row}


def test_csv_has_a_line_for_each_row(tmp_path):
    run_with("csv", tmp_path / "run")
    lines = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert [line["step"] for line in lines] == ["1", "2"]
    assert lines[0]["val_loss"] == "" and lines[1]["val_accuracy"] == "0.5"


def test_tensorboard_has_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_with("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(one.step, float(tf.make_ndarray(one.tensor_proto))) for one in events.Tensors("loss")]
    assert found == [(1, 3.0), (2, 2.0)]


def test_wandb_offline_is_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_with("wandb", tmp_path / "run")
    first = json.loads((tmp_path / "run" / "reports.json").read_text())["wandb"]
    run_with("wandb", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "reports.json").read_text())["wandb"] == first
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{first}"))


def test_mlflow_is_one_run_in_the_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow-skinny")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for _ in range(2):
        run_with("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "run" / "mlruns").as_uri())
    (experiment,) = [one for one in client.search_experiments() if one.name == "tf_dist"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["loss"] == 2.0 and run.data.params["layers"] == "4"


def test_a_missing_package_is_said_before_the_run(monkeypatch):
    monkeypatch.setattr(reports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendMissing, match="pip install mlflow-skinny"):
        check_installed(Config(report_to="csv, mlflow"))


def test_callbacks_of_a_function(tmp_path, monkeypatch):
    (tmp_path / "watching.py").write_text(
        "import keras\n"
        "def good(config): return [keras.callbacks.LambdaCallback()]\n"
        "def bad(config): return [config]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (found,) = users_callbacks(Config(callbacks="watching:good"))
    assert isinstance(found, keras.callbacks.Callback)
    with pytest.raises(UsageError, match="not a list of Keras callbacks"):
        users_callbacks(Config(callbacks="watching:bad"))
    assert users_callbacks(Config()) == []


def test_numbers_of_a_row():
    assert reports.numbers({"step": 3, "a": 1, "b": None, "c": "x", "d": np.float64(2)}) == {
        "a": 1.0,
        "d": 2.0,
    }
    assert importlib.util.find_spec("tensorboard")
