"""`--help` of every program: short usage, an example, headings, lines that fit; and at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tf_dist.flags import GROUPS

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "train": ["scripts/train.py"],
    "prepare": ["scripts/prepare.py"],
    "generate": ["scripts/generate.py"],
    "evaluate": ["scripts/evaluate.py"],
    "bench": ["scripts/bench.py"],
    "all": ["-m", "tf_dist"],
    "run": ["-m", "tf_dist", "run"],
    "checkpoint": ["-m", "tf_dist", "checkpoint"],
    "doctor": ["-m", "tf_dist", "doctor"],
    "chat": ["-m", "tf_dist", "chat"],
    "lm-eval": ["-m", "tf_dist", "lm-eval"],
}
# Fails where one of these is imported.
WITHOUT = "import runpy, sys; sys.modules |= dict.fromkeys(('tensorflow', 'keras', 'mpi4py', 'horovod'))\n"


def ask(program, *words, columns=80):
    first, *rest = PROGRAMS[program]
    name = rest.pop(0) if first == "-m" else str(ROOT / first)
    how = "run_module" if first == "-m" else "run_path"
    code = f"{WITHOUT}sys.argv = {[name, *rest, *words]!r}\nrunpy.{how}({name!r}, run_name='__main__')"
    environment = {name: value for name, value in os.environ.items() if "COMM_WORLD" not in name}
    environment |= {
        "COLUMNS": str(columns),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment, cwd=ROOT
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program):
    done = ask(program, "--help")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, blank, *_ = done.stdout.splitlines()
    assert first.startswith("usage: ") and blank == ""
    name = PROGRAMS[program][-1] if program != "all" else "tf_dist"
    examples = re.findall(rf"^    .*python .*{re.escape(name)}.*$", done.stdout, re.MULTILINE)
    assert examples
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_a_heading_for_each_group_and_none_with_most_flags():
    lines = ask("train", "--help").stdout.splitlines()
    at = [lines.index(f"{group}:") for group in GROUPS]
    assert at == sorted(at)
    flags = [
        sum(line.startswith("  --") for line in lines[a:b]) for a, b in zip(at, [*at[1:], None], strict=True)
    ]
    assert min(flags) >= 1 and max(flags) <= 10


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("bench", ["nothing-of-the-kind"], "no benchmark"),
        ("bench", ["--report=1"], "--report"),
        ("generate", ["--max-new-tokens", "3"], "Did you mean '--tokens'?"),
        ("prepare", ["--batch-size", "3"], "see --help"),
        ("checkpoint", ["mend", "x"], "invalid choice"),
        ("doctor", ["--cleen"], "Did you mean '--clean'?"),
        ("all", ["chekpoint"], "Did you mean"),
    ],
)
def test_what_is_not_understood_is_64_and_one_error(program, words, said):
    done = ask(program, *words)
    assert done.returncode == 64 and done.stderr.count("error: ") == 1, done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr


def test_the_options_of_a_run_are_printed_without_tensorflow(tmp_path):
    (tmp_path / "config.yaml").write_text("layers: 7\n")
    done = ask("train", "--print-config", "--run-dir", str(tmp_path))
    assert done.returncode == 0 and "\nlayers: 7\n" in done.stdout
