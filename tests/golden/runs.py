"""How the cases are trained, in one launch for each number of ranks, and where their weights' hashes are.

All that is known here of the package are the flags of ``scripts/train.py`` and the ``weights_sha256`` of a
run's ``status.json``, so this survives any change inside.
"""

import importlib.metadata
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cases import CASES, HALF, RANKS, STEPS, Case

HASHES = Path(__file__).with_name("hashes.json")
WORDS = "the a quick brown fox cat dog tree sat ran jumps over under on lazy mat and then".split()
COMMON = (
    *("--tokenizer", "byte", "--layers", "1", "--width", "32", "--heads", "2", "--dropout", "0.1"),
    *("--seq-len", "16", "--global-batch-size", "8", "--micro-batch-size", "2", "--warmup-steps", "2"),
    *("--steps", str(STEPS), "--save-every", str(HALF), "--eval-every", "0", "--log-every", str(STEPS)),
    # How a sum is split between threads is in its last bits, and so is what autotune may choose.
    *("--threads-per-rank", "1", "--autotune", "off", "--xla", "off", "--progress", "none"),
)
PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "numpy")
# By which TensorFlow, oneDNN and BLAS choose their kernels.
INSTRUCTIONS = "avx avx2 fma avx512f avx512_vnni avx512_bf16 amx_bf16 asimd sve bf16".split()


def hashes(
    start: Callable[[int, list[list[str]], Path], Any], folder: Path, cases: Sequence[Case] = CASES
) -> dict[str, str]:
    """Train the cases; the SHA-256 of the weights of each, by its key.

    Args:
        start: trains lists of flags on some ranks, one after another in one launch, and returns the job:
            how it ended is its ``code``, and what it said its ``output``.
        folder: for the runs.
        cases: to be trained, with those that they resume.
    """
    corpus = folder / "corpus.txt"
    rng = random.Random(1)
    corpus.write_text("".join(" ".join(rng.choices(WORDS, k=8)) + ".\n" for _ in range(200)))
    found = {}
    for ranks in RANKS:
        of_ranks = [case for case in cases if case.ranks == ranks]
        keys = [case.key for case in of_ranks]
        if not keys:
            continue
        job = start(ranks, list(_all_flags(of_ranks, folder)), folder)
        assert job.code == 0, job.output
        found.update({key: _weights(_run(folder, key)) for key in keys})
    return found


def _all_flags(cases: Sequence[Case], folder: Path) -> Iterator[list[str]]:
    own = ("--data", str(folder / "corpus.txt"), "--prepared-dir", str(folder / "prepared"))
    for case in cases:
        saved = _run(folder, case.resumes) / "checkpoints" / f"step-{HALF:08d}"
        resumes = ("--resume", str(saved)) if case.resumes else ()
        yield [*COMMON, *own, *case.flags, *resumes, "--run-dir", str(_run(folder, case.key))]


def _run(folder: Path, key: str) -> Path:
    return folder / key.replace(" ", "-")


def _weights(run: Path) -> str:
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("done", STEPS), run
    return str(status["weights_sha256"])


def environment() -> dict[str, str]:
    """What decides about bits, beside the code: the processor, and the packages that compute."""
    found = dict(_processor())
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"oneDNN": "on"}  # jobs start without TensorFlow's variables, and this is its default


def _processor() -> Iterator[tuple[str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:  # no Linux
        return
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    yield "processor", fields.get("model name", "")
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    yield "instruction sets", " ".join(one for one in INSTRUCTIONS if one in flags)


def recorded() -> dict[str, Any]:
    """What stands in ``hashes.json``: ``environment``, and ``weights`` by key."""
    return dict(json.loads(HASHES.read_text()))
