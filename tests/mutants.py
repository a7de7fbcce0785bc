"""Plants faults of one line, one by one, and says which tests catch each.

    python tests/mutants.py                        # all: some half an hour on two cores
    python tests/mutants.py --only tree sent       # those whose names contain one of these words
    python tests/mutants.py --sound                # the same tests without a fault: all must pass

Each fault is planted in a copy of the files that git tracks, and the tests that must catch it are run there:
those of `make test`, without what is marked ``extended``, and on the numbers of ranks that it runs them on.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutant import Mutant
from mutants_of_ranks import OF_RANKS
from mutants_of_runs import OF_RUNS

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = (*OF_RANKS, *OF_RUNS)
# Ranks that wait for each other for ever have caught a fault as well.
LIMIT_S = 300
# What pytest ends with where tests have failed; more than that is no verdict: there was no such test.
PASSED, FAILED, NO_VERDICT = 0, 1, (2, 3, 4, 5)
ON_RANKS = re.compile(r"np (\d+): (.+)")


def planted(text: str, mutant: Mutant) -> str:
    """A file with the fault in it.

    Raises:
        SystemExit: its text is not there, or more than once.
    """
    count = text.count(mutant.old)
    if count != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} has this {count} times, not once:\n{mutant.old}")
    return text.replace(mutant.old, mutant.new)


def copy_to(folder: Path) -> None:
    """Copy the files that git tracks."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    tar = ["tar", "--null", "--ignore-failed-read", "-T", "-", "-cf", "-"]
    packed = subprocess.run(tar, cwd=ROOT, input=names, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-xf", "-"], cwd=folder, input=packed, check=True)


def command_of(tests: str) -> list[str]:
    """What runs some tests: ``np 2: tests/mpi/test_x.py``, or without ranks."""
    on_ranks = ON_RANKS.fullmatch(tests)
    words = on_ranks[2].split() if on_ranks else tests.split()
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--color=no", *words]
    if not on_ranks:
        return pytest
    beside = Path(sys.executable).with_name("mpirun")
    return [str(beside if beside.exists() else "mpirun"), "-np", on_ranks[1], *pytest]


def verdict(tests: str, folder: Path) -> tuple[str, str]:
    """Run tests on a copy: "passed", "failed", "hung" or "no verdict"; and what failed first, or why."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "TMPDIR": str(folder / "tmp")}
    environment.pop("TF_DIST_TESTS", None)
    (folder / "tmp").mkdir(exist_ok=True)
    sourced = ["bash", "-c", 'source scripts/mpi_environment.sh && exec "$@"', "bash", *command_of(tests)]
    process = subprocess.Popen(
        sourced, cwd=folder, env=environment, start_new_session=True, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        end_session(process.pid)
        process.communicate()
        return "hung", f"{tests} after {LIMIT_S} s"
    end_session(process.pid)
    if process.returncode == PASSED:
        return "passed", ""
    first = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[.*)?(?: - .*)?$", output, re.MULTILINE)
    if first is None and process.returncode in NO_VERDICT:
        return "no verdict", output[-2000:]
    return "failed", first[1] if first else f"{tests} (exit code {process.returncode})"


def end_session(pid: int) -> None:
    """End what is left of a launch: ranks have process groups of their own."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                session = (entry / "stat").read_text().rpartition(")")[2].split()[3]
                if int(session) == pid:
                    os.kill(int(entry.name), signal.SIGKILL)


def try_out(mutant: Mutant) -> tuple[Mutant, str, str, float]:
    """Plant a fault and run its tests until one catches it: the mutant, the outcome, by what, and seconds."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        copy_to(folder)
        path = folder / mutant.file
        path.write_text(planted(path.read_text(), mutant))
        for tests in mutant.tests:
            outcome, by = verdict(tests, folder)
            if outcome != "passed":
                caught = "no verdict" if outcome == "no verdict" else "caught"
                where = re.sub(r"^np (\d+): .*", r"np \1: ", tests) if "np " in tests else ""
                return mutant, caught, where + by.rpartition("/")[2], time.monotonic() - begun
    return mutant, "missed", "", time.monotonic() - begun


def show_sound(mutants: list[Mutant]) -> int:
    """Run the tests of all these mutants without a fault: 0 if all pass."""
    bad = 0
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy_to(Path(name))
        for tests in dict.fromkeys(tests for mutant in mutants for tests in mutant.tests):
            outcome, by = verdict(tests, Path(name))
            print(f"{outcome:10} {tests} {by}", flush=True)
            bad += outcome != "passed"
    return int(bad > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="mutants whose names contain one of these")
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at once")
    parser.add_argument("--sound", action="store_true", help="run their tests without a fault")
    asked = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if any(word in mutant.name for word in asked.only)]
    for mutant in mutants:
        planted((ROOT / mutant.file).read_text(), mutant)
    if asked.sound:
        return show_sound(mutants)
    results = []
    with ThreadPoolExecutor(asked.jobs) as pool:
        for result in pool.map(try_out, mutants):
            mutant, outcome, by, seconds = result
            results.append(result)
            print(f"{outcome:10} {mutant.name:32} {seconds:5.0f} s  {by}", flush=True)
    missed = [mutant for mutant, outcome, _, _ in results if outcome != "caught"]
    print(f"\n{len(results) - len(missed)} of {len(results)} caught")
    print("\n".join(f"  not caught: {mutant.name}: {mutant.breaks}" for mutant in missed))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
