"""Whole jobs, started as a user starts them: a launch line, a folder, an exit code and what was printed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import mpirun, session_members, sourced_environment

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
WARM = Path(__file__).with_name("warm.py")
# A job of these tests takes some ten seconds. One that takes this long hangs.
HANGS_S = 240
# How long after its end a job may still have processes.
GONE_S = 5
# What pytest, the tests in this process or a launcher around them set, and a user's shell does not.
NOT_A_USERS = ("KERAS_BACKEND", "PYTEST", "TF_", "OMP_", "OPENBLAS_", "MKL_", "RAYON_", "PYTHONPATH")
WORDS = "the a quick brown fox cat dog tree sat ran jumps over under on lazy mat and then".split()

# A picture of the loss and a sample of 200 tokens are a second of a core at the end of each run, and are
# looked at where one run is one job.
SEVERAL = """
import json, sys
from pathlib import Path

script = Path(sys.argv[1])
sys.path.insert(0, str(script.parent))
module = __import__(script.stem)
if script.stem == "train":
    from tf_dist.run import job
    job.loss_curve = lambda metrics, picture, title: "none is drawn in this test"
    job.SAMPLE_TOKENS = job.SAMPLE_TOKENS_SHARDED = 2
for flags in json.loads(Path(sys.argv[2]).read_text()):
    module.main(flags)
    print("-----", flush=True)
"""


# Files of minutes, in this order: a worker that began the last of them late would leave the others idle.
LONGEST = """
    golden fuzz_fit runs updates readme grids deaths equivalence failures keras_suite memory_limit
""".split()


def pytest_collection_modifyitems(items):
    """The longest files first. With ``--dist loadfile`` that takes ``--no-loadscope-reorder``."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@dataclass(frozen=True)
class Ended:
    """A job that is over. ``output`` is stdout and stderr of all ranks; ``ended_at`` is unix time."""

    code: int
    output: str
    seconds: float
    ended_at: float


class Job:
    """A job under way, in a session of its own, so that nothing of it can survive us."""

    def __init__(self, command, cwd, environment):
        self.command = [str(word) for word in command]
        self._log = cwd / f"output-{time.monotonic_ns()}.txt"
        self._begun = time.monotonic()
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                self.command,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def output(self):
        return self._log.read_text(errors="replace")

    def running(self):
        return self._process.poll() is None

    def wait(self, timeout=HANGS_S):
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"{self} hangs: not over after {timeout} s\n{self.output()}")
        seconds, ended_at = time.monotonic() - self._begun, time.time()
        self._check_gone()
        return Ended(code, self.output(), seconds, ended_at)

    def wait_until(self, condition, timeout=HANGS_S):
        """Wait, looking often, until ``condition()`` holds while the job is running."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.running() or time.monotonic() > deadline:
                self.kill()
                pytest.fail(f"{self} did not come so far\n{self.output()}")
            time.sleep(0.005)

    def pid_of_rank(self, rank):
        assert WARM.name not in " ".join(self.command), "who looks for a rank's process starts it cold"
        wanted = f"OMPI_COMM_WORLD_RANK={rank}".encode()
        for pid in session_members(self.pid):
            try:
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if wanted in variables:
                return pid
        raise AssertionError(f"{self} has no rank {rank}")

    def kill(self):
        """End every process of the session: ranks are in process groups of their own."""
        for _ in range(100):
            members = session_members(self.pid)
            if not members and not self.running():
                return
            for pid in members:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            self._process.poll()
            time.sleep(0.05)

    def _check_gone(self):
        deadline = time.monotonic() + GONE_S
        while session_members(self.pid):
            if time.monotonic() > deadline:
                left = session_members(self.pid)
                self.kill()
                pytest.fail(f"{self} is over, but {len(left)} processes of it live on\n{self.output()}")
            time.sleep(0.02)

    def __repr__(self):
        return "`" + " ".join(self.command) + "`"


class WarmPython:
    """A process that has TensorFlow loaded, and forks ranks (`warm.py`); begun when first asked for.

    Args:
        environment: of a user, in which it loads.
    """

    def __init__(self, environment):
        self._environment, self._process, self._folder = environment, None, None

    def python(self):
        """What to start in place of this Python."""
        if self._process is None:
            self._folder = tempfile.TemporaryDirectory(prefix="warm-")
            self._socket = Path(self._folder.name) / "socket"
            self._process = subprocess.Popen(
                [sys.executable, WARM, "serve", self._socket],
                env=self._environment | {"TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert self._process.stdout.readline() == b"ready\n"
        return [sys.executable, "-S", "-E", WARM, self._socket]

    def end(self):
        if self._process is not None:
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait()
            self._folder.cleanup()


class Launcher:
    """Starts jobs in a folder, and ends those that a failing test left running.

    Attributes:
        is_cold: each rank is a new interpreter, as of a user; else it may be forked from a warm one.
    """

    def __init__(self, mpirun, environment):
        self._mpirun, self._environment, self._jobs = mpirun, environment, []
        self._warm, self.is_cold = WarmPython(environment), False

    def start(self, np, *args, cwd, env=None, cold=False):
        """Start ``python *args`` on ``np`` ranks; 0 is without mpirun."""
        return self.start_parts([(np, args)], cwd=cwd, env=env, cold=cold)

    def start_parts(self, parts, *, cwd, env=None, cold=False):
        """Start ``mpirun -np N python ... : -np M python ...``; each part may begin with mpirun options."""
        command = []
        python = [sys.executable] if cold else self._python(parts, env or {})
        for np, args in parts:
            options = [word for word in args if isinstance(word, tuple)]
            words = [self._word(word) for word in args if not isinstance(word, tuple)]
            launch = ["-np", np, *sum(options, ())] if np else []
            command += [*([":"] if command else []), *launch, *python, *words]
        if parts[0][0]:
            command.insert(0, self._mpirun)
        return self.start_command(command, cwd=cwd, env=env)

    def _python(self, parts, env):
        """A new interpreter, or one that has TensorFlow loaded where that makes no difference."""
        scripts = [next(str(word) for word in args if not isinstance(word, tuple)) for _, args in parts]
        foreign = [name for name in env if not name.startswith("TF_DIST_")]
        if self.is_cold or foreign or not all(script.endswith(".py") for script in scripts):
            return [sys.executable]
        return self._warm.python()

    def warm_python(self):
        """What to start in place of this Python, for who starts jobs of its own."""
        return self._warm.python()

    def start_command(self, command, *, cwd, env=None):
        self._jobs.append(Job(command, cwd, self._environment | (env or {})))
        return self._jobs[-1]

    def several(self, np, script, all_flags, *, cwd, env=None):
        """Start one job that calls a script's ``main`` once for each list of flags: TensorFlow loads once."""
        stamp = time.monotonic_ns()
        driver, lists = cwd / f"several_{stamp}.py", cwd / f"several-{stamp}.json"
        driver.write_text(SEVERAL)
        lists.write_text(json.dumps([[str(flag) for flag in flags] for flags in all_flags]))
        return self.start(np, driver, SCRIPTS / script, lists, cwd=cwd, env=env)

    def end_all(self):
        for job in self._jobs:
            job.kill()
        self._warm.end()

    @staticmethod
    def _word(word):
        return SCRIPTS / word if isinstance(word, str) and (SCRIPTS / word).is_file() else word


def launcher_here():
    """A `Launcher` of this checkout with a user's environment; skips where jobs cannot start."""
    if any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        pytest.skip("started under mpirun; this test launches its own ranks")
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs /proc to find the processes of a job")
    if mpirun() is None:
        pytest.skip("no mpirun beside this Python or on PATH")
    environment = sourced_environment()
    environment = {name: value for name, value in environment.items() if not name.startswith(NOT_A_USERS)}
    # As in an activated .venv: `python` and `mpirun` are the ones of this Python.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)  # this checkout, also where another one is installed
    return Launcher(mpirun(), environment)


@pytest.fixture(scope="session")
def launcher():
    """The launcher of all jobs; under mpirun, where these tests cannot start their own ranks, a skip."""
    made = launcher_here()
    yield made
    made.end_all()


@pytest.fixture(autouse=True)
def _cold_or_warm(request):
    """Let jobs of a test that is marked ``cold`` start as a user's, whatever that costs."""
    if "launcher" in request.fixturenames:
        request.getfixturevalue("launcher").is_cold = request.node.get_closest_marker("cold") is not None


@pytest.fixture
def start_job(launcher, tmp_path):
    """``start_job(np, *args, env=..., cwd=..., cold=...)``: a `Job` under way, in ``tmp_path``."""
    return lambda np, *args, cwd=tmp_path, **more: launcher.start(np, *args, cwd=cwd, **more)


@pytest.fixture
def run_job(start_job):
    """``run_job(np, *args, timeout=..., env=..., cwd=...)``: an `Ended` job."""
    return lambda np, *args, timeout=HANGS_S, **more: start_job(np, *args, **more).wait(timeout)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small text of our own, always the same."""
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("".join(" ".join(rng.choices(WORDS, k=8)) + ".\n" for _ in range(200)))
    return path


@pytest.fixture(scope="session")
def prepared_dir(tmp_path_factory):
    """Prepared tokens, shared by all jobs."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def small(corpus, prepared_dir):
    """Flags of a model so small that a step takes milliseconds."""
    return [
        *("--data", str(corpus), "--prepared-dir", str(prepared_dir), "--tokenizer", "byte"),
        *("--layers", "1", "--width", "16", "--heads", "2", "--dropout", "0.1", "--seq-len", "16"),
        *("--global-batch-size", "8", "--warmup-steps", "5", "--log-every", "1", "--eval-every", "0"),
    ]


@dataclass(frozen=True)
class Run:
    """A run's folder, and the job that made it."""

    path: Path
    flags: list
    job: Ended

    @property
    def metrics(self):
        return read_metrics(self.path)

    @property
    def status(self):
        return json.loads((self.path / "status.json").read_text())


def read_metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def first_run(launcher, small, tmp_path_factory):
    """Sixty steps on two ranks without an accident. Nobody may change its folder: copy it."""
    folder = tmp_path_factory.mktemp("first")
    flags = [*small, "--steps", "60", "--save-every", "20", "--keep", "2", "--eval-every", "20"]
    path = folder / "run"
    job = launcher.start(2, "train.py", *flags, "--run-dir", path, cwd=folder).wait()
    assert job.code == 0, job.output
    return Run(path, flags, job)


@pytest.fixture
def copy_of_first(first_run, tmp_path):
    """A copy of the first run's folder, to be changed."""
    return shutil.copytree(first_run.path, tmp_path / "copy")


@pytest.fixture
def one_error():
    """``one_error(job, code, *words)``: the job ended with one message, and the code that it promises."""

    def check(job, code, *words):
        assert job.code == code, job.output
        assert job.output.count("error:") == 1, job.output
        assert "Traceback" not in job.output, job.output
        for word in words:
            assert word in job.output, job.output

    return check
