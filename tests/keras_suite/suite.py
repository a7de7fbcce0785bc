"""Keras's own tests, with tf_dist in the way and without: ``make keras-suite``.

A test is to pass, be skipped or fail on R ranks as it does without tf_dist, but for `known_exceptions`.
Ends with 0 where that is so.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "oracle")]

from jobs import end_job, environment
from known_exceptions import is_left_out, reason_for
from launching import mpirun

# What `make test` has time for; `make keras-suite` runs ALL.
QUICK = (
    "callbacks/csv_logger_test.py",
    "callbacks/early_stopping_test.py",
    "optimizers/adam_test.py",
)
ALL = ("callbacks", "optimizers", "trainers")
# Outcomes do not change by the number of ranks: they ask for packages or devices that are not there.
LEFT_OUT = ("orbax_checkpoint_test", "torch_data_loader_adapter_test", "grain_dataset_adapter_test")
# Seconds without a finished test after which a launch counts as hanging.
HANGS_S = 300


def sources():
    """``keras/src`` of the installed Keras, with its tests; None where it was packaged without them."""
    import importlib.util

    folder = Path(importlib.util.find_spec("keras").origin).parent / "src"
    return folder if any(folder.glob("callbacks/*_test.py")) else None


def outcomes(files, np_, folder, left_out=()):
    """``{test: (outcome, text)}`` with tf_dist over ``np_`` ranks; 0: without it."""
    found, launches = {}, 0
    while True:
        report = Path(folder) / f"np{np_}-{launches}.jsonl"
        code = _launch(files, np_, report, [*left_out, *found], Path(folder))
        begun = None
        for line in report.read_text().splitlines() if report.exists() else []:
            note = json.loads(line)
            if note["outcome"] == "begun":
                begun = note["test"]
            else:
                known = found.get(note["test"], ("passed", ""))
                found[note["test"]] = (note["outcome"], note["text"]) if known[0] == "passed" else known
        launches += 1
        if code in (0, 1, 5):  # pytest has come to its end
            return found
        if begun is None:
            raise RuntimeError(f"no test has begun: {report.with_suffix('.log').read_text()[-3000:]}")
        said = report.with_suffix(".log").read_text(errors="replace")[-2000:]
        found[begun] = ("died", f"{'hangs' if code is None else f'the job ended with {code}'}: {said}")


def _launch(files, np_, report, done, folder):
    """One pytest over all ranks; its exit code, None where it hangs."""
    listed = report.with_suffix(".done")
    listed.write_text(json.dumps(done))
    settings = {"KERAS_SUITE_REPORT": str(report), "KERAS_SUITE_DONE": str(listed)}
    settings["KERAS_SUITE_RANKS"] = "1" if np_ else "0"
    known = environment() | settings
    known["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), known["PYTHONPATH"]])
    launch = [mpirun() or "mpirun", "-np", str(np_)] if np_ > 1 else []
    empty = folder / "pytest.ini"
    empty.write_text("[pytest]\n")
    options = ["-c", str(empty), "--rootdir", str(folder), "-p", "no:cacheprovider", "-p", "no:xdist"]
    ignored = [f"--ignore={path}" for name in LEFT_OUT for path in sources().rglob(f"{name}.py")]
    options += ["-p", "in_the_way", "-q", "--color=no", *ignored]
    with open(report.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            [*launch, sys.executable, "-m", "pytest", *options, *(str(file) for file in files)],
            cwd=folder,
            env=known,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    size, since = -1, time.monotonic()
    while process.poll() is None:
        now = report.stat().st_size if report.exists() else 0
        if now != size:
            size, since = now, time.monotonic()
        if time.monotonic() - since > HANGS_S:
            end_job(process)
            return None
        time.sleep(0.05)
    return process.returncode


def differences(plain, ranks, np_):
    """Lines about tests that end otherwise over ranks, and of exceptions that are none any more."""
    bad, excused = [], []
    for test, (wanted, _) in plain.items():
        outcome, text = ranks.get(test, ("not run", ""))
        if outcome == wanted:
            continue
        reason = reason_for(test, np_)
        line = f"np {np_} {test}: {outcome}, without tf_dist {wanted}"
        (bad if reason is None else excused).append(f"{line}: {reason or _last(text)}")
    return bad, excused


def _last(text):
    lines = [line for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("E ")] or lines
    return " / ".join(line.strip() for line in told[-4:])[:600]


def run_hopeful(files, np_, folder):
    """What differs; only files with a test that does not pass run without tf_dist as well."""
    ranks = outcomes(files, np_, folder)
    failed = {test.partition("::")[0] for test, (word, _) in ranks.items() if word != "passed"}
    doubtful = [file for file in files if any(str(file).endswith(name) for name in failed)]
    if not ranks:
        return [f"np {np_}: no test was run"], []
    if not doubtful:
        return [], [f"{np_:>7}  {_counts(ranks)}"]
    return run(doubtful, [np_], Path(folder) / "doubtful")


def run(files, counts, folder):
    """What differs, and a table of outcomes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    plain = outcomes(files, 0, folder)
    bad, lines = [], [f"{'ranks':>7}  outcomes", f"{'without':>7}  {_counts(plain)}"]
    for np_ in counts:
        ranks = outcomes(files, np_, folder, [test for test in plain if is_left_out(test, np_)])
        wrong, excused = differences(plain, ranks, np_)
        bad += wrong
        lines += [f"{np_:>7}  {_counts(ranks)}", *(f"         excused: {line}" for line in excused)]
    return bad, lines


def _counts(found):
    return ", ".join(f"{n} {word}" for word, n in Counter(one for one, _ in found.values()).most_common())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--np", type=int, nargs="+", default=[1, 2], help="ranks")
    parser.add_argument("--quick", action="store_true", help="the part that `make test` runs")
    parser.add_argument("--folder", help="for reports; a new temporary one by default")
    parser.add_argument("files", nargs="*", help="below keras/src; all by default")
    arguments = parser.parse_args()
    keras = sources()
    if keras is None:
        print("this Keras was installed without its tests")
        return 0
    folder = arguments.folder or tempfile.mkdtemp(prefix="keras-suite-")
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = [keras / file for file in arguments.files or (QUICK if arguments.quick else ALL)]
    bad, lines = run(files, arguments.np, folder)
    print("\n".join([*lines, *bad, f"{len(bad)} unexpected differences; reports in {folder}"]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
