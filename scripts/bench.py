"""Benchmarks: each prints one table and leaves one JSON file under runs/bench/.

    python scripts/bench.py exact        # does the number of ranks change a bit?
    python scripts/bench.py exact-cost   # and what does it cost that it does not?

`make bench` runs all of them, `make bench-NAME` one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

BENCHMARKS = {"exact": "bench_exact.py", "exact-cost": "bench_exact_cost.py"}


def main(argv: list[str]) -> int:
    """Run the benchmarks that are named, or all; the exit code is 1 where one shows what must not be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", choices=[*BENCHMARKS, []], metavar="NAME", help="which; none: all"
    )
    names = parser.parse_args(argv).names or list(BENCHMARKS)
    files = [Path(__file__).with_name(BENCHMARKS[name]) for name in names]
    return max(subprocess.run([sys.executable, file]).returncode for file in files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
