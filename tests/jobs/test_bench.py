"""Benchmarks as they start their own jobs, on models of a size that one can wait for."""

import json

import pytest

from tf_dist.bench import memory, step, strategies
from tf_dist.bench.faults import in_place


@pytest.mark.extended
def test_ways_that_share_a_job(run_job, tmp_path):
    out = tmp_path / "out.json"
    ended = run_job(2, "-m", step.MODULE, "ranks", "tiny-gpt", str(out))
    assert ended.code == 0, ended.output
    found = json.loads(out.read_text())
    assert {"ours", "ours xla", "alone", "compute", "mpi4py", "gemm"} <= set(found["times_ms"])
    assert all(time > 0 for times in found["times_ms"].values() for time in times)
    summary = step.summary("tiny-gpt", {step.StepJob(2, "ranks"): [found]})
    assert step.tables("tiny-gpt", summary | {"absent": {}})
    assert set(found["parts_ms"]) == {*step.PARTS, "step"}  # every clock was passed


def test_multi_worker_mirrored_strategy_trains_alike_on_its_workers(run_job, tmp_path):
    out = tmp_path / "out.json"
    ports = ",".join(map(str, step.free_ports(2)))
    ended = run_job(2, "-m", step.MODULE, "mwms", "tiny-gpt", ports, str(out))
    assert ended.code == 0, ended.output
    assert len(json.loads(out.read_text())["times_ms"]["mwms"]) == 5


@pytest.mark.extended
def test_memory_of_every_rank(run_job, tmp_path):
    out = tmp_path / "out.json"
    ended = run_job(2, "-m", memory.MODULE, "tiny-gpt", str(out))
    assert ended.code == 0, ended.output
    job = json.loads(out.read_text())
    assert len(job["of_ranks"]) == 2
    for rank in job["of_ranks"]:
        assert 0 < rank["baseline_pss"] < rank["baseline_rss"]
        assert 0 < rank["peak_pss"] < rank["peak_rss"] <= rank["whole_rss"]
    assert memory.table([job])


@pytest.mark.extended
def test_ranks_that_kill_themselves_change_nothing(run_job, tmp_path):
    found = []
    for ranks, deaths in ((3, 2), (1, 0)):
        out = tmp_path / f"{deaths}.json"
        ended = run_job(ranks, ("--with-ft", "ulfm"), "-m", in_place.MODULE, deaths, 7, out)
        assert ended.code == 0, ended.output
        found.append(json.loads(out.read_text()))
    killed, calm = found
    assert sum(len(one["lost"]) for one in killed["recoveries"]) == 2 and killed["ranks"] == 1
    assert killed["weights_sha256"] == calm["weights_sha256"]


@pytest.mark.extended
def test_strategies_learn(run_job, corpus, tmp_path):
    names = ["allreduce", "powersgd 4", "diloco 50 delayed", "downpour 4"]
    what = {"text": str(corpus), "names": names, "steps": 8, "every": 4, "ranks": 2, "rows": 8}
    (tmp_path / strategies.FOLDER).mkdir(parents=True)
    (tmp_path / strategies.FOLDER / strategies.WHAT).write_text(json.dumps(what))
    out = tmp_path / "out.json"
    ended = run_job(2, "-m", strategies.MODULE, "learn", "tiny-gpt", str(out))
    assert ended.code == 0, ended.output
    runs = json.loads(out.read_text())
    assert list(runs) == names
    for run in runs.values():
        assert [point[0] for point in run["points"]] == [4, 8] and run["points"][-1][2] > 0
    assert runs["downpour 4"]["master"]["updates"] == 8 * 2  # units of two micro-batches
    assert strategies.learn_table({"ranks": 2, "model": "tiny-gpt", "runs": runs})
