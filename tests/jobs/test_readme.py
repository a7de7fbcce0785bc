"""Every command of the README is run, in its order, in a folder that looks like a checkout.

A command is a line of a ```bash block that begins with ``mpirun``, ``python scripts/`` or ``make train``.
Flags are appended that make its model small and its run short; texts that would have to be downloaded are
replaced by a small one.
"""

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RUN = ("mpirun ", "python scripts/", "make train")
# Flags that override what the line says.
SHORT = {
    "train.py": [
        *("--steps", "3", "--epochs", "0", "--max-bytes", "60000", "--vocab-size", "0"),
        *("--layers", "1", "--width", "16", "--heads", "2", "--seq-len", "16", "--micro-batch-size", "0"),
        *("--global-batch-size", "8", "--save-every", "3", "--eval-every", "3", "--log-every", "1"),
    ],
    "generate.py": ["--tokens", "5"],
    "prepare.py": ["--max-bytes", "60000"],
    "evaluate.py": [],
}


def commands(text):
    """The lines to be run, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip().startswith(RUN)]


def shortened(line, corpus, folder):
    """The words of a command, with a small model, a short run, and text that is here."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        given = next((word for word in words if word.startswith("ARGS=")), "ARGS=")
        words = [word for word in words if word != given]
        flags = shlex.split(given.removeprefix("ARGS=")) + SHORT["train.py"]
        # What `make install` makes is there: this Python's environment.
        made = ["-o", "install", f"VENV={sys.prefix}", f"MPIRUN={Path(sys.prefix) / 'bin' / 'mpirun'}"]
        return [*words, *made, "ARGS=" + shlex.join(flags)]
    script = next((Path(word).name for word in words if word.startswith("scripts/")), None)
    return with_text_that_is_here(words, corpus, folder) + SHORT.get(script, [])


def with_text_that_is_here(words, corpus, folder):
    downloads = tuple(yaml.safe_load((ROOT / "data" / "datasets.yaml").read_text()))
    replaced, after_data = [], False
    for word in words:
        after_data = (not word.startswith("-") and after_data) or word == "--data"
        is_here = word == "stdlib" or any(folder.glob(word))
        missing = after_data and word != "--data" and not is_here
        replaced.append(str(corpus) if missing or word.split("/")[0] in downloads else word)
    return replaced


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with everything of the repository, but runs and prepared data of its own."""
    folder = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("data", "runs") and not entry.name.startswith("."):
            (folder / entry.name).symlink_to(entry)
    (folder / "data").mkdir()
    for entry in (ROOT / "data").iterdir():
        if entry.name not in ("prepared", "downloads"):
            (folder / "data" / entry.name).symlink_to(entry)
    rows = "".join(f"{word} number {i},{word}\n" for i in range(20) for word in ("good", "bad"))
    (folder / "reviews.csv").write_text(f"text,label\n{rows}")
    return folder


@pytest.fixture(scope="module")
def warm_path(launcher, tmp_path_factory):
    """A PATH on which ``python SCRIPT.py`` is forked from an interpreter that has TensorFlow loaded."""
    folder = tmp_path_factory.mktemp("bin")
    warm, cold = shlex.join(map(str, launcher.warm_python())), shlex.quote(sys.executable)
    (folder / "python").write_text(
        f'#!/bin/sh\ncase "$1" in *.py) exec {warm} "$@" ;; *) exec {cold} "$@" ;; esac\n'
    )
    (folder / "python").chmod(0o755)
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.mark.parametrize("line", commands(README.read_text()) if README.exists() else ["no README.md"])
def test_command(launcher, checkout, corpus, warm_path, line):
    if not README.exists():
        pytest.skip("README.md is missing")
    if "horovod" in line and importlib.util.find_spec("horovod") is None:
        pytest.skip("Horovod is not installed: `make horovod`")
    words = shortened(line, corpus, checkout)
    job = launcher.start_command(words, cwd=checkout, env={"PATH": warm_path}).wait()
    assert job.code == 0, f"{shlex.join(words)}\n{job.output}"
    assert "Traceback" not in job.output, job.output
    if "generate.py" in line:
        assert job.output.strip()
    if "evaluate.py" in line:
        assert '"val_loss"' in job.output
    if line.startswith("make train") or "train.py" in line:
        assert "done at step 3" in job.output or "already reached" in job.output


# The extraction itself -----------------------------------------------------------------------------

EXAMPLE = """
```bash
make install
. .venv/bin/activate && make test
make train ARGS='--model lstm'   # a comment
mpirun -np 2 python scripts/train.py \\
    --data 'texts/**/*.txt' tinyshakespeare --steps 1000
python scripts/generate.py --prompt 'def '
```
mpirun is not a command here
```python
mpirun -np 2 python x.py
```
"""


def test_commands_are_found():
    found = commands(EXAMPLE)
    assert [line.split()[0] for line in found] == ["make", "mpirun", "python"]
    assert "tinyshakespeare --steps 1000" in found[1]


def test_commands_are_shortened(tmp_path):
    make, mpirun, python = (shortened(line, "corpus.txt", tmp_path) for line in commands(EXAMPLE))
    assert make[:2] == ["make", "train"]
    assert make[-1].startswith("ARGS=--model lstm --steps 3")
    assert mpirun[:8] == "mpirun -np 2 python scripts/train.py --data corpus.txt corpus.txt".split()
    assert mpirun[8:12] == ["--steps", "1000", "--steps", "3"]
    assert python == ["python", "scripts/generate.py", "--prompt", "def ", "--tokens", "5"]
