"""Random user scripts on R ranks against one process of plain Keras: ``make fuzz-fit``.

Ends with 0 where every script either gives what plain Keras gives or is refused before its first step.
"""

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "oracle"))

from jobs import Runs
from plan import plan_of
from script import script_of


def run(seeds_of, runs):
    """Verdicts by number of ranks and seed.

    Args:
        seeds_of: by number of ranks, those of the scripts to run on so many.
        runs: where to.
    """
    scripts = {seed: runs.folder / f"seed-{seed}.py" for seeds in seeds_of.values() for seed in seeds}
    for seed, script in scripts.items():
        text = script_of(seed)
        if not script.exists() or script.read_text() != text:
            script.write_text(text)
    runs.plain(list(scripts.values()))
    found = {}
    for size, seeds in seeds_of.items():
        chosen = [scripts[seed] for seed in seeds]
        runs.ranks(chosen, size)
        found[size] = dict(zip(seeds, runs.verdicts(chosen, size).values(), strict=True))
    return found


def table(found, folder):
    """Numbers of verdicts, then every script that is not equal."""
    lines = ["", f"{'ranks':>5}  verdicts"]
    for size, verdicts in found.items():
        words = Counter(verdict.word for verdict in verdicts.values())
        lines.append(f"{size:>5}  " + ", ".join(f"{count} {word}" for word, count in words.most_common()))
    for size, verdicts in found.items():
        for seed, verdict in verdicts.items():
            if verdict.word != "equal":
                where = "" if verdict.good else f"\n       {_summary(seed)}\n       {folder}/seed-{seed}.py"
                lines.append(f"np {size} seed {seed}: {verdict.word}: {_short(verdict.detail)}{where}")
    return "\n".join(lines)


def _summary(seed):
    plan = plan_of(seed)
    fields = [f"{name}={value}" for name, value in vars(plan).items() if value and name != "seed"]
    return " ".join(fields)


def _short(text):
    return " ".join(text.split())[:400]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--number", type=int, default=300, help="of scripts")
    parser.add_argument("--seed", type=int, default=1, help="of the first script; the others follow")
    parser.add_argument("--np", type=int, nargs="+", default=[2, 3], help="ranks")
    parser.add_argument("--folder", help="for scripts and results; a new temporary one by default")
    arguments = parser.parse_args()
    folder = arguments.folder or tempfile.mkdtemp(prefix="fuzz-fit-")
    begun = time.monotonic()
    seeds = range(arguments.seed, arguments.seed + arguments.number)
    found = run(dict.fromkeys(arguments.np, seeds), Runs(folder))
    print(table(found, folder))
    bad = sum(not verdict.good for verdicts in found.values() for verdict in verdicts.values())
    print(f"{arguments.number} scripts, {bad} bad verdicts, {time.monotonic() - begun:.0f} s, in {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
