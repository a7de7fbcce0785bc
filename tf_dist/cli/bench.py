"""Benchmarks: each prints its tables and writes a JSON file and a plot to runs/bench/.

    tf-dist bench exact            # one of those below
    tf-dist bench step gpt-0.81M   # of one model, or lstm-1.08M
    tf-dist bench faults numbers   # a part of it: NaN, flipped bits
    tf-dist bench                  # all of them: hours
    tf-dist bench --report         # targets and results

  exact       bit-identical weights on any number of ranks?
  exact-cost  and the overhead of that
  comm        all-reduce: ours, MPI's, Horovod's, and the memory bandwidth
  optimizer   the optimizer step: per variable, flat, in blocks
  decode      text: tokens/s with a cache and without
  step        training tokens/s: ours and all baselines
  scaling     weak and strong scaling, against the compute-only ceiling
  memory      memory of a rank, against a formula
  nanogpt     time to a validation loss, against PyTorch
  muon        steps to a validation loss: Muon against AdamW
  network     two emulated hosts: all-reduce, steps with overlap, Horovod
  parallel    every grid of 2 and 4 ranks: tokens/s, bytes, memory, bubbles
  strategies  strategies and compressions: loss over steps, time and bytes
  faults      fault injection: same weights, and the recovery time
  fault-cost  overhead of fault tolerance without faults
  tasks       every task on real data, against baselines: `make tasks`

`make bench` runs all of them, `make bench-NAME` one (with ARGS=gpt-0.81M of one model). They start their own
ranks.
"""

from __future__ import annotations

import importlib
import sys

from tf_dist.bench import runner
from tf_dist.errors import UsageError
from tf_dist.flags import Parser
from tf_dist.invocation import program, spelled

NAMES = (
    "exact", "exact-cost", "comm", "optimizer", "decode", "step", "scaling", "memory", "nanogpt", "muon",
    "network", "parallel", "strategies", "faults", "fault-cost", "tasks",
)  # fmt: skip
# Others have a module of their own name.
MODULES = {"faults": "faults.campaign", "fault-cost": "faults.cost"}
# These take words: names of models or tasks, or the path of a text.
WITH_WORDS = (
    "decode", "step", "scaling", "memory", "nanogpt", "muon", "parallel", "strategies", "faults",
    "fault-cost", "tasks",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the benchmarks that are named, or all; the exit code is 1 where one shows what must not be."""
    try:
        return run(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def run(argv: list[str]) -> int:
    """As `main`.

    Raises:
        UsageError: there is no such benchmark or flag.
    """
    parser = Parser(spelled(__doc__ or ""), "[NAME ...] [options]", program("bench"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run [all]")
    parser.add_argument("--report", action="store_true", help="print the targets as a table for Markdown")
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="repetitions of step, scaling, nanogpt and parallel",
    )
    arguments = parser.parse_args(argv)
    if arguments.rounds:
        runner.ROUNDS = max(1, arguments.rounds)
    if arguments.report:
        print(importlib.import_module("tf_dist.bench.report").targets())
        return 0
    names = [name for name in arguments.names if name in NAMES] or NAMES
    words = [word for word in arguments.names if word not in NAMES]
    if words and not (len(names) == 1 and names[0] in WITH_WORDS):
        parser.error(f"{' '.join(words)}: no benchmark; they are {', '.join(NAMES)}")
    modules = [
        importlib.import_module(f"tf_dist.bench.{MODULES.get(name, name.replace('-', '_'))}")
        for name in names
    ]
    return max(int(module.main(words) if words else module.main()) for module in modules)
