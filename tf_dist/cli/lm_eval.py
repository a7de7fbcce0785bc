"""Evaluate a run with EleutherAI's lm-evaluation-harness, on every rank.

    pip install 'tf_dist[eval]'
    tf-dist lm-eval runs/one --tasks mine --include-path tasks/
    mpirun -np 4 tf-dist lm-eval runs/one --tasks lambada_openai

Tasks are the harness's, or YAML files of a folder. The table goes to standard output, and to a JSON file with
--output. A task of the harness's own may want to download its data, and code of its own is not run.

Exit codes: 0 done, 64 usage, 69 lm_eval is not installed, 77 no usable checkpoint.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

from tf_dist import terminal
from tf_dist.atomic_io import write_whole
from tf_dist.cli.run_flags import add_code_flags
from tf_dist.comm.runtime import launch
from tf_dist.errors import BackendMissing, UsageError
from tf_dist.flags import Parser
from tf_dist.invocation import command, spelled


def main(argv: list[str]) -> int:
    """Evaluate; the exit code."""
    terminal.tolerate_any_text()
    try:
        flags = _parser().parse_args(argv)
    except SystemExit:  # --help was answered
        return 0
    if importlib.util.find_spec("lm_eval") is None:
        raise BackendMissing("tf-dist lm-eval needs a package: pip install lm_eval")
    comm = launch.join()
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    from tf_dist.run.lm_eval_adapter import RunLM
    from tf_dist.run.load_run import load_run

    run = load_run(flags.run, flags.checkpoint, flags.model, flags.task)
    if run.config.task != "causal-lm":
        raise UsageError(f"{flags.run} is of --task {run.config.task}, and the harness asks language models")
    tasks = TaskManager(include_path=flags.include_path, include_defaults=not flags.include_path)
    unknown = [name for name in flags.tasks.split(",") if name not in tasks.all_tasks]
    if unknown:
        raise UsageError(f"--tasks {flags.tasks}: no task {unknown[0]!r} there")
    found: dict[str, Any] = simple_evaluate(
        model=RunLM(run, comm, flags.batch), tasks=flags.tasks.split(","), num_fewshot=flags.num_fewshot,
        limit=flags.limit, task_manager=tasks, bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    if comm.rank == 0:
        terminal.write(make_table(found))
        if flags.output:
            results = {"results": found["results"], "run": str(flags.run), "step": run.step}
            write_whole(Path(flags.output), (json.dumps(results, indent=1, default=str) + "\n").encode())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(spelled(__doc__ or ""), "RUN --tasks NAMES [options]", command("lm-eval"))
    parser.add_argument("run", metavar="RUN", help="its folder")
    parser.add_argument("--tasks", required=True, metavar="NAMES", help="of the harness, with commas")
    parser.add_argument("--include-path", metavar="FOLDER", help="where YAML files of tasks are; only these")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task, at most")
    parser.add_argument("--batch", type=int, default=16, metavar="N", help="rows at once [16]")
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results")
    parser.add_argument(
        "--checkpoint", default="latest", metavar="latest|best|PATH", help="which one [latest]"
    )
    add_code_flags(parser)
    return parser
