"""Who carries the bytes does not matter, and a backend that is not there is named."""

import json
import os

import numpy as np
import pytest

from tf_dist.checkpoint import store

STEPS = 60  # of `first_run`, which MPI carried


def test_horovod_trains_as_mpi_does(run_job, first_run, tmp_path):
    pytest.importorskip("horovod", reason="Horovod is not installed: `make horovod`")
    flags = [*first_run.flags, "--backend", "horovod", "--run-dir", tmp_path / "run"]
    job = run_job(2, "train.py", *flags)
    assert job.code == 0, job.output
    assert "backend horovod" in job.output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ours, theirs = [json.loads(line) for line in lines], first_run.metrics
    assert [row["step"] for row in ours] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "tokens", "learning_rate"):
        np.testing.assert_allclose(
            [row[name] for row in ours], [row[name] for row in theirs], rtol=0, atol=1e-6, err_msg=name
        )
    assert ours[-1]["val_loss"] == pytest.approx(theirs[-1]["val_loss"], abs=1e-6)
    folder = f"checkpoints/step-{STEPS:08d}"
    tensors = [store.load(path / folder)[0].values() for path in (tmp_path / "run", first_run.path)]
    for mine, other in zip(*tensors, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("horovod", "reason"),
    [
        ("raise ModuleNotFoundError(\"No module named 'horovod'\")", "No module named 'horovod'"),
        ("raise OSError('undefined symbol: _ZN10tensorflow')", "undefined symbol: _ZN10tensorflow"),
    ],
)
def test_without_horovod(run_job, small, tmp_path, one_error, horovod, reason):
    """Not installed, or built for another TensorFlow: the message says how to get it."""
    (tmp_path / "path" / "horovod").mkdir(parents=True)
    (tmp_path / "path" / "horovod" / "__init__.py").write_text(horovod + "\n")
    flags = [*small, "--steps", "2", "--backend", "horovod", "--run-dir", tmp_path / "run"]
    job = run_job(2, "train.py", *flags, env={"PYTHONPATH": os.fspath(tmp_path / "path")}, timeout=60)
    one_error(job, 69, reason)
    assert job.output.count("make horovod") == 1
    assert not (tmp_path / "run").exists()


def test_no_such_backend(run_job, small, one_error):
    job = run_job(2, "train.py", *small, "--backend", "horovd", timeout=60)
    one_error(job, 64, "Did you mean 'horovod'?")
