"""A wheel, installed into an empty environment, trains from an empty folder: nobody needs a checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = (
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "data",
    "pyproject.toml",
    "setup.cfg",
    "setup.py",
    "tf_dist",
)
TINY = [
    *("--max-bytes", "60000", "--tokenizer", "byte", "--layers", "1", "--width", "16", "--heads", "2"),
    *("--seq-len", "16", "--global-batch-size", "8", "--eval-every", "0", "--autotune", "off"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the sources; a build leaves files beside them."""
    sources, made = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns("__pycache__", "prepared", "downloads")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=leave)
        else:
            shutil.copy(ROOT / name, sources / name)
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", made, sources)
    (path,) = made.glob("*.whl")
    return path


def pip(*words):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Words of environment for a user of the wheel: a new environment that sees the packages of this one."""
    prefix = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", prefix], check=True, timeout=120)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(prefix), "platbase": str(prefix)}))
    # TensorFlow is not installed once more. A path in a .pth file brings no .pth files of its own, so what
    # makes the checkout importable there does not do so here.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip("--python", prefix / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    libraries = os.pathsep.join(
        filter(None, [str(Path(sys.prefix) / "lib"), os.environ.get("LD_LIBRARY_PATH")])
    )
    own, here = prefix / "bin", Path(sys.executable).parent
    path = os.pathsep.join(map(str, (own, here, os.environ["PATH"])))
    return {"PATH": path, "PYTHONPATH": "", "LD_LIBRARY_PATH": libraries, "VIRTUAL_ENV": str(prefix)}


def test_it_holds_what_a_user_needs_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for path in (ROOT / "data").glob("*.yaml"):
            assert archive.read(f"tf_dist/data/{path.name}") == path.read_bytes()
    assert "tf_dist/py.typed" in names
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tf_dist").rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"tf_dist"}


def test_a_training_from_an_empty_folder(launcher, installed, tmp_path):
    def ended(*words, code=0):
        job = launcher.start_command(words, cwd=tmp_path, env=installed).wait()
        assert job.code == code, job.output
        return job.output

    where = ended("python", "-c", "import tf_dist.recipes as r; print(r.FOLDER)").strip()
    assert where.startswith(installed["VIRTUAL_ENV"]) and sorted(os.listdir(where)).count("nanogpt.yaml") == 1
    said = ended("tf-dist", "--help")
    assert said.startswith("usage: tf-dist COMMAND") and "    mpirun -np 2 tf-dist train" in said
    assert "dead jobs" in ended("tf-dist", "doctor")
    assert "\nmicro_batch_size: " in ended("tf-dist", "train", "--config", "nanogpt", "--print-config")
    # The registry is there, and nothing is downloaded.
    assert "Did you mean tinyshakespeare?" in ended("tf-dist", "prepare", "tinyshakspeare", code=65)

    trained = ended("mpirun", "-np", "2", "tf-dist", "train", *TINY, "--steps", "3")
    assert "done at step 3" in trained
    assert "more text    tf-dist generate --run-dir runs/" in trained
    assert "sound" in ended("tf-dist", "checkpoint", "verify", "runs/latest")
    assert ended("tf-dist", "generate", "--tokens", "5").strip()
