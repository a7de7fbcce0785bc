"""Two ranks train what one cannot: whole jobs whose ranks may have so much memory and no more.

The limit is RLIMIT_AS, which the kernel keeps for each process, without rights and everywhere. It counts
address space: also what is reserved and never used, and windows that ranks share. That is more than memory:
nothing is left out, as windows are by RLIMIT_DATA; and a cgroup kills without a word. What Python, MPI and
TensorFlow reserve is found out by a job with a tiny model. So that it does not depend on chance, ranks have
one thread, glibc two arenas, for each of which it reserves 64 MB, and blocks of 1 MiB go back when they are
freed.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.cold

pytest.importorskip("resource")

LAYERS, WIDTH, ROWS, T = 4, 1088, 2, 16
# Without embeddings and biases, which are 1 % more.
PARAMETERS = 12 * LAYERS * WIDTH**2
# A rank may have this many for each parameter of the model, beyond what a tiny model takes. Two ranks with
# shards take 14: 8 by formula, a shard of the first micro-batch's gradient and of the scaled one, and the
# weights and gradients of a segment. One rank certainly needs 24, which it is refused before it begins, and
# would take more than 40.
BYTES_PER_PARAMETER = 19

ZERO_3 = ["--update", "zero", "--zero-stage", "3"]

LIMITED = """
import atexit, os, resource, runpy, sys
from pathlib import Path

limit, peaks, script, *flags = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))


def leave_peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("VmPeak:"))
    Path(peaks, os.environ["OMPI_COMM_WORLD_RANK"]).write_text(kib)


atexit.register(leave_peak)
sys.argv = [script, *flags]
sys.path.insert(0, os.path.dirname(script))
runpy.run_path(script, run_name="__main__")
"""


@dataclass(frozen=True)
class Limited:
    """A job that is over, its folder, and the most address space that each of its ranks had, in bytes."""

    job: object
    path: Path
    peaks: list

    @property
    def losses(self):
        lines = map(json.loads, (self.path / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    @property
    def status(self):
        return json.loads((self.path / "status.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("limited")


@pytest.fixture(scope="module")
def run_limited(launcher, corpus, prepared_dir, folder):
    """``run_limited(np, limit, name, *flags, width=...)``: a `Limited` job; limit 0 is none."""
    script = folder / "limited.py"
    script.write_text(LIMITED)
    begins = [
        *("--data", corpus, "--prepared-dir", prepared_dir, "--tokenizer", "byte", "--seq-len", T),
        *("--layers", LAYERS, "--heads", 2, "--global-batch-size", ROWS, "--micro-batch-size", 1),
        *("--threads-per-rank", 1, "--warmup-steps", 2, "--log-every", 1, "--eval-every", 0),
        *("--dropout", 0, "--learning-rate", "5e-5", "--keep", 1),
    ]

    def run(np, limit, name, *flags, width=WIDTH):
        peaks = folder / f"peaks-{len(list(folder.glob('peaks-*')))}"
        peaks.mkdir()
        words = [script, limit, peaks, "train.py", *begins, "--width", width, *flags]
        environment = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        job = launcher.start(np, *words, "--run-dir", folder / name, cwd=folder, env=environment).wait()
        found = [int(path.read_text()) * 1024 for path in sorted(peaks.iterdir())]
        return Limited(job, folder / name, found)

    return run


@pytest.fixture(scope="module")
def limit(run_limited):
    """Bytes of address space for each rank."""
    tiny = run_limited(2, 0, "tiny", "--steps", 2, width=16)
    assert tiny.job.code == 0, tiny.job.output
    assert len(tiny.peaks) == 2
    return max(tiny.peaks) + BYTES_PER_PARAMETER * PARAMETERS


@pytest.fixture(scope="module")
def two_ranks(run_limited, limit):
    """Two steps of two ranks, each with its shard of everything."""
    return run_limited(2, limit, "two", *ZERO_3, "--steps", 2)


def test_one_rank_is_out_of_memory_and_says_so(run_limited, limit, one_error):
    one = run_limited(1, limit, "one", "--steps", 2)
    one_error(
        one.job,
        71,
        "out of memory before the first step",
        "ulimit -v",
        f"{limit / 2**30:.2f} GiB",
        "--zero-stage 3",
    )
    assert not one.path.exists()  # a start that fails leaves no run


def test_two_ranks_train_and_save(two_ranks, limit):
    assert two_ranks.job.code == 0, two_ranks.job.output
    assert (two_ranks.status["state"], two_ranks.status["step"]) == ("done", 2)
    assert two_ranks.losses[2] < two_ranks.losses[1]
    assert len(two_ranks.peaks) == 2 and max(two_ranks.peaks) <= limit


@pytest.mark.extended
def test_two_ranks_go_on_from_what_they_saved(run_limited, two_ranks, limit):
    assert two_ranks.job.code == 0, two_ranks.job.output
    before = two_ranks.losses
    again = run_limited(2, limit, "two", *ZERO_3, "--steps", 4)
    assert again.job.code == 0, again.job.output
    assert "resumed at step 2" in again.job.output
    assert (again.status["state"], again.status["step"]) == ("done", 4)
    assert list(again.losses) == [1, 2, 3, 4] and again.losses[4] < before[1]
    assert len(again.peaks) == 2 and max(again.peaks) <= limit


@pytest.mark.extended
def test_one_process_without_a_limit_writes_with_it(run_job, two_ranks):
    written = run_job(0, "generate.py", "--run-dir", two_ranks.path, "--prompt", "the ", "--tokens", 3)
    assert written.code == 0, written.output
    assert "the " in written.output
