"""Random fault campaigns: the weights must be those of an undisturbed run.

    python scripts/bench.py faults                     # all of it, an hour
    python scripts/bench.py faults files               # some parts of it
    python scripts/bench.py faults in-place restarts seeds=10

The parts: checkpoints are damaged, and their writers killed (`files`); ranks are killed, and the
others finish the step (`in_place`); jobs are started again, go on with other numbers of ranks, begin
again without those who died, are killed once a minute (`jobs`); gradients and weights are spoiled
(`numbers`); one rank fails, leaves, crashes or stops (`culprits`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from tf_dist.bench import runner
from tf_dist.bench.faults import culprits, files, in_place, jobs, numbers
from tf_dist.errors import UsageError

FOLDER = runner.FOLDER / "faults"
# What a part has found: to be kept, a table, and whether all was as it must be.
CompleteSnapshot = tuple[Any, str, bool]


def main(words: Sequence[str] = ()) -> int:
    """Do what was asked for; tables, a JSON file, and 1 where something ended otherwise than it must.

    Args:
        words: parts, all of them where none is named; seeds=N of each; ranks=N, of ``in-place`` alone.
    """
    options = dict(word.split("=", 1) for word in words if "=" in word)
    wanted = [word for word in words if "=" not in word]
    if unknown := set(wanted) - set(PARTS):
        print(
            f"error: no such part: {', '.join(sorted(unknown))}. They are {', '.join(PARTS)}", file=sys.stderr
        )
        return UsageError.exit_code
    kept, all_sound = dict[str, Any](), True
    for part in wanted or PARTS:
        found, table, sound = PARTS[part](options)
        print(f"\n{table}\n", flush=True)
        kept[part], all_sound = found, all_sound and sound
        path = runner.save("faults", kept)  # after each: the next one may take long
    print(f"in {path}")
    return int(not all_sound)


def _seeds(options: dict[str, str], usual: int) -> int:
    return int(options.get("seeds", usual))


def _files(options: dict[str, str]) -> CompleteSnapshot:
    found = files.main()
    return found, files.table(found), files.sound(found)


def _in_place(options: dict[str, str]) -> CompleteSnapshot:
    counts = (int(options["ranks"]),) if "ranks" in options else in_place.RANKS
    found = in_place.main(_seeds(options, in_place.SEEDS), counts)
    sound = all(len(in_place.sound(job)) == len(job["runs"]) for job in found)
    return found, in_place.table(found), sound


def _numbers(options: dict[str, str]) -> CompleteSnapshot:
    found = numbers.main(_seeds(options, numbers.SEEDS), FOLDER)
    return found, numbers.table(found), numbers.sound(found)


def _culprits(options: dict[str, str]) -> CompleteSnapshot:
    found = culprits.main(_seeds(options, culprits.SEEDS))
    return found, culprits.table(found), culprits.sound(found)


def _of_jobs(part: str) -> Callable[[dict[str, str]], CompleteSnapshot]:
    def run(options: dict[str, str]) -> CompleteSnapshot:
        lines = jobs.main(part, _seeds(options, jobs.SEEDS[part]))
        kept = [line._asdict() for line in lines]
        return kept, jobs.table(lines), all(line.sound for line in lines)

    return run


PARTS: dict[str, Callable[[dict[str, str]], CompleteSnapshot]] = {
    "files": _files,
    "in-place": _in_place,
    **{part: _of_jobs(part) for part in jobs.SEEDS},
    "numbers": _numbers,
    "culprits": _culprits,
}
