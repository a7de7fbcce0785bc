"""Benchmarks: each prints its tables and leaves one JSON file under runs/bench/.

    python scripts/bench.py exact        # does the number of ranks change a bit?
    python scripts/bench.py exact-cost   # and what does it cost that it does not?
    python scripts/bench.py comm         # sums over ranks: ours, MPI's, Horovod's, and the memory limit
    python scripts/bench.py network      # two emulated hosts: sums and steps, ours with overlap, Horovod
    python scripts/bench.py optimizer    # a step of the optimizer: each variable by itself, flat, in blocks
    python scripts/bench.py step         # tokens/s of training: ours, compute alone, mpi4py, Horovod, Keras

`make bench` runs all of them, `make bench-NAME` one. They start their own ranks.
"""

from __future__ import annotations

import argparse
import importlib
import sys

NAMES = ("exact", "exact-cost", "comm", "optimizer", "step", "network")


def main(argv: list[str]) -> int:
    """Run the benchmarks that are named, or all; the exit code is 1 where one shows what must not be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help="which; none: all")
    names = parser.parse_args(argv).names or NAMES
    modules = [importlib.import_module(f"tf_dist.bench.{name.replace('-', '_')}") for name in names]
    return max(int(module.main()) for module in modules)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
