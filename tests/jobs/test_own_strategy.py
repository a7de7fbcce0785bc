"""A strategy of a user, by ``--strategy module:Class``: it trains, goes on, and runs only where named."""

import json

STRATEGY = """
import numpy as np

from tf_dist.parallel.totals import own_sum
from tf_dist.strategies import Strategy


class SignVote(Strategy):
    def step(self, request):
        gradient = own_sum(request.gradients(), request.replica.parameters)
        request.totals.reduce(request.mesh.all)
        votes = np.sign(gradient)
        request.mesh.all.allreduce(votes)
        request.replica.apply(np.sign(votes), 1.0)
        return request.replica.norm(votes)

    def describe(self):
        return "by the signs of the majority"
"""
FLAG = ("--strategy", "voting:SignVote")


def test_a_strategy_of_a_user(run_job, small, tmp_path):
    (tmp_path / "voting.py").write_text(STRATEGY)
    run = tmp_path / "run"
    flags = [*small, "--steps", "6", "--run-dir", run]
    job = run_job(2, "train.py", *flags, *FLAG, cwd=tmp_path)
    assert job.code == 0, job.output
    assert "strategy SignVote" in job.output and "by the signs of the majority" in job.output
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    assert "strategy: voting:SignVote" in (run / "config.yaml").read_text()
    again = run_job(2, "train.py", "--run-dir", run, "--steps", "8", cwd=tmp_path)
    assert again.code == 78 and "add --strategy voting:SignVote" in again.output
    again = run_job(2, "train.py", "--run-dir", run, "--steps", "8", *FLAG, cwd=tmp_path)
    assert again.code == 0, again.output
    lines = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
