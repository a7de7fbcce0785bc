"""Jobs that fail, peers that are not there, and words that mean nothing."""

import sys
from pathlib import Path

import pytest

from tf_dist.bench import memory, models, nanogpt, runner, step
from tf_dist.cli import bench

sys.path.insert(0, str(Path(__file__).parent))
import canned

DOCS = Path(__file__).parents[2] / "docs"


def test_a_job_that_fails_is_said_with_the_end_of_its_log(tmp_path, capsys):
    log = tmp_path / "logs" / "job.log"
    with pytest.raises(SystemExit, match=r"ended with 3; see .*job\.log"):
        runner.run([sys.executable, "-c", "print('the last words'); raise SystemExit(3)"], log)
    assert "the last words" in capsys.readouterr().err


def test_a_job_that_hangs_is_stopped_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "LIMIT_S", 0.5)
    with pytest.raises(SystemExit, match=r"was not over after 0\.5 s"):
        runner.run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "job.log")


def test_launch_starts_ranks_by_mpirun_or_by_another_command(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(runner, "run", lambda command, log: commands.append([str(w) for w in command]))
    runner.launch(2, "a.module", "word", log=tmp_path / "log")
    runner.launch(2, "a.module", log=tmp_path / "log", by=["starter", "--"])
    runner.launch(0, "a.module", log=tmp_path / "log", python="other")
    assert commands[0][1:] == ["-np", "2", sys.executable, "-m", "a.module", "word"]
    assert Path(commands[0][0]).name == "mpirun"
    assert commands[1] == ["starter", "--", sys.executable, "-m", "a.module"]
    assert commands[2] == ["other", "-m", "a.module"]


def test_without_pytorch_it_is_said_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "TORCH", tmp_path / "no-python")
    with pytest.raises(runner.Absent, match="make torch"):
        runner.torch_python()


def test_without_horovod_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(runner.Absent, match="make horovod"):
        runner.need_horovod()


class Jobs:
    """Stands for `running.measured`."""

    def __init__(self, monkeypatch, failing=()):
        self.started, self.failing = [], failing
        monkeypatch.setattr(runner, "measured", self)

    def __call__(self, ranks, module, kind, name, *words, folder, python=sys.executable):
        self.started.append((kind, *words))
        if kind in self.failing:
            raise SystemExit(f"error: {kind} ended with 1")
        if kind == "ranks":
            return canned.step_job(ours=[10.0], gemm=[100.0])
        return canned.step_job(**{"torch" if kind == "one" else kind: [20.0]})


def test_peers_that_are_absent_or_fail_are_said_and_not_fatal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runner, "TORCH", tmp_path / "no-python")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    jobs = Jobs(monkeypatch, failing=("mwms",))
    found = step.measure("tiny-gpt")
    assert set(found["absent"]) == {
        *("MultiWorkerMirroredStrategy, own loop, ring", "PyTorch DDP, gloo", "PyTorch in one process")
    }
    assert {row["way"] for row in found["rows"]} >= {"ours", "horovod", "fit plain", "fit xla"}
    assert len([job for job in jobs.started if job[0] == "mwms"]) == 1  # not tried again
    text = step.tables("tiny-gpt", found)
    assert text.count("make torch") == 2
    assert "mwms ended with 1" in text


def test_jobs_take_turns(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(runner, "TORCH", Path(sys.executable))
    jobs = Jobs(monkeypatch)
    found = step.measure("tiny-gpt")
    half = len(jobs.started) // 2
    kinds = [(job[0], *(word for word in job[1:] if "," not in word)) for job in jobs.started]
    assert kinds[:half] == kinds[half:]
    assert not found["absent"]


def test_our_own_job_may_not_fail(monkeypatch):
    Jobs(monkeypatch, failing=("ranks",))
    with pytest.raises(SystemExit, match="ranks ended with 1"):
        step.measure("tiny-gpt")


def test_unknown_models_are_refused():
    with pytest.raises(SystemExit, match=r"no model gpt-9: choose of .*gpt-0\.81M"):
        models.chosen(["gpt-9"])
    assert models.chosen([]) == list(models.MEASURED)
    with pytest.raises(SystemExit, match="only for Transformers"):
        memory.main(["tiny-lstm"])


def test_unknown_benchmarks_are_refused(capsys):
    assert bench.main(["stp"]) == 64
    assert "stp: no benchmark; they are exact" in capsys.readouterr().err


def test_every_benchmark_is_in_the_documentation():
    text = (DOCS / "benchmarks.md").read_text()
    assert [name for name in bench.NAMES if f"bench-{name}`" not in text] == []


def test_nanogpt_without_a_text_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert nanogpt.main([]) == 0
    assert "skipped, for there is no text" in capsys.readouterr().out
