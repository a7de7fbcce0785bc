"""Jobs end together: what fails on one rank ends all of them, within seconds, and is said once."""

import re
import shutil

import pytest

# From the failure to the end of mpirun.
TOGETHER_S = 5

# `fail()` tells the time. Without TensorFlow: what is tested here is how ranks find each other's end.
BEFORE = """
import os, sys, threading, time
import numpy as np
from tf_dist.comm.runtime import launch
from tf_dist.errors import DataError

def fail():
    print(f"FAILED AT {time.time()}", flush=True)

comm = launch.join()
data = np.ones(1000)
for i in range(10**9):
    comm.allreduce(data)
    data[:] = 1
    time.sleep(0.001)
"""

FAILURES = {
    # name: (what is done at i == 20, exit code, what is said once, whether there is a traceback)
    "exception on the last rank": (
        "if comm.rank == 2: fail(); raise RuntimeError('the words of rank 2')",
        70, ["RuntimeError: the words of rank 2", "rank 2: Traceback"], 1,
    ),
    "exception on rank 0": (
        "if comm.rank == 0: fail(); raise KeyError('the words of rank 0')",
        70, ["KeyError: 'the words of rank 0'", "rank 0: Traceback"], 1,
    ),
    "exception in a thread": (
        "def work(): fail(); raise RuntimeError('the words of a thread')\n"
        "    if i == 20 and comm.rank == 1: threading.Thread(target=work, name='loader').start()",
        70, ["RuntimeError: the words of a thread", "rank 1, thread loader"], 1,
    ),
    "a failure we foresaw": (
        "if comm.rank == 1: fail(); raise DataError('there is no text here')",
        65, ["rank 1: error: there is no text here"], 0,
    ),
    "sys.exit with a number": (
        "if comm.rank == 1: fail(); sys.exit(3)", 70, ["rank 1 called sys.exit(3)", "fail(); sys.exit(3)"], 0,
    ),
    "sys.exit with a text": (
        "if comm.rank == 1: fail(); sys.exit('no more')", 70, ["rank 1 called sys.exit('no more')"], 0,
    ),
    "sys.exit(0) while others wait": (
        "if comm.rank == 1: fail(); sys.exit(0)", 70, ["rank 1 left the job", "fail(); sys.exit(0)"], 0,
    ),
    "sys.exit(0) of rank 0": (
        "if comm.rank == 0: fail(); sys.exit(0)", 70, ["fail(); sys.exit(0)"], 0,
    ),
    "raise SystemExit": (
        "if comm.rank == 1: fail(); raise SystemExit", 70, ["rank 1 left the job"], 0,
    ),
    "the end of the loop comes early": (
        "if comm.rank == 2: fail(); break", 70, ["rank 2 left the job"], 0,
    ),
}  # fmt: skip


def seconds_from_failure(job):
    """From the last rank's failure to the end of the job."""
    failed = re.findall(r"FAILED AT ([\d.]+)", job.output)
    assert failed, job.output
    return job.ended_at - max(map(float, failed))


def at_step_20(statement):
    if statement.startswith("def "):
        return BEFORE + f"    {statement}\n"
    return BEFORE + f"    if i == 20:\n        {statement}\n"


@pytest.mark.parametrize("name", FAILURES)
def test_one_rank_ends_all(run_job, tmp_path, name):
    statement, code, words, tracebacks = FAILURES[name]
    (tmp_path / "job.py").write_text(at_step_20(statement))
    job = run_job(3, "job.py", timeout=60)
    assert job.code == code, job.output
    assert seconds_from_failure(job) < TOGETHER_S
    assert job.output.count("Traceback (most recent call last)") == tracebacks, job.output
    for text in words:
        assert job.output.count(text) == 1, job.output


ULFM = ("--with-ft", "ulfm")
SOME = [
    "sys.exit(0) while others wait",
    "sys.exit(0) of rank 0",
    "exception in a thread",
    "sys.exit with a number",
]


@pytest.mark.parametrize("name", SOME)
def test_one_rank_ends_all_also_where_a_death_ends_nobody(run_job, tmp_path, name):
    statement, code, words, _ = FAILURES[name]
    (tmp_path / "job.py").write_text(at_step_20(statement))
    job = run_job(3, ULFM, "job.py", timeout=60)
    assert job.code == code, job.output
    assert seconds_from_failure(job) < 2 * TOGETHER_S
    for text in words:
        assert text in job.output, job.output


# A rank sleeps and ends before the others have begun: they do not wait in MPI_Init.
EARLY = """
import os, signal, sys, time
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    time.sleep(1.5)
    {death}
from tf_dist.comm.runtime import launch
launch.join()
"""


@pytest.mark.cold
@pytest.mark.parametrize("launcher_flags", [(), ULFM], ids=["plain", "ulfm"])
@pytest.mark.parametrize("death", ["sys.exit(0)", "sys.exit(3)", "os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_rank_that_ends_before_mpi_begins(run_job, tmp_path, launcher_flags, death):
    (tmp_path / "job.py").write_text(EARLY.format(death=death))
    job = run_job(3, launcher_flags, "job.py", timeout=60)
    assert job.code != 0
    if launcher_flags or death == "sys.exit(0)":  # else mpirun may have ended the others already
        assert job.code == 70, job.output
        assert job.output.count("error: the job cannot begin: rank 1 ended before") == 1, job.output


@pytest.mark.parametrize("death", ["os._exit(9)", "os.kill(os.getpid(), 11)"])
def test_a_rank_that_dies_without_a_word(run_job, tmp_path, death):
    (tmp_path / "job.py").write_text(at_step_20(f"if comm.rank == 1: fail(); {death}"))
    job = run_job(3, "job.py", timeout=60)
    assert job.code != 0
    assert seconds_from_failure(job) < TOGETHER_S


@pytest.mark.parametrize(
    ("statement", "code", "said"),
    [
        ("raise DataError('nobody has text')", 65, "error: nobody has text"),
        ("raise RuntimeError('a bug of all')", 70, "RuntimeError: a bug of all"),
        ("sys.exit(5)", 5, ""),
        ("sys.exit(0)", 0, ""),
    ],
)
def test_all_ranks_end_with_one_voice(run_job, tmp_path, statement, code, said):
    (tmp_path / "job.py").write_text(at_step_20(f"fail(); {statement}"))
    job = run_job(3, "job.py", timeout=60)
    assert job.code == code, job.output
    assert seconds_from_failure(job) < TOGETHER_S
    if said:
        # Not the line of the source that a traceback quotes.
        assert len(re.findall(f"^{re.escape(said)}$", job.output, re.MULTILINE)) == 1, job.output
    assert "rank 0:" not in job.output
    assert "left the job" not in job.output


def test_two_errors_are_both_said(run_job, tmp_path):
    errors = "['no left shoe', 'no right shoe', 'no left shoe'][comm.rank]"
    (tmp_path / "job.py").write_text(at_step_20(f"fail(); raise DataError({errors})"))
    job = run_job(3, "job.py", timeout=60)
    assert job.code == 65, job.output
    assert job.output.count("ranks 0, 2: error: no left shoe") == 1
    assert job.output.count("rank 1: error: no right shoe") == 1
    assert job.output.count("error:") == 2


def test_a_job_under_horovod_ends_together(run_job, tmp_path):
    pytest.importorskip("horovod", reason="Horovod is not installed: `make horovod`")
    program = at_step_20("if comm.rank == 1: fail(); raise RuntimeError('the words of rank 1')")
    (tmp_path / "job.py").write_text(program.replace("join()", "connect('horovod')"))
    job = run_job(2, "job.py", timeout=120)
    assert job.code == 70, job.output
    assert seconds_from_failure(job) < TOGETHER_S
    assert job.output.count("RuntimeError: the words of rank 1") == 1


# The training script -------------------------------------------------------------------------------

MODEL = """
import os, sys, time

def build(config):
    if os.environ["OMPI_COMM_WORLD_RANK"] == "{rank}":
        print(f"FAILED AT {{time.time()}}", file=sys.__stdout__, flush=True)
        open("failed.txt", "w").write(str(time.time()))
        {statement}
    time.sleep(30)
"""


@pytest.mark.parametrize(
    ("rank", "statement", "said"),
    [
        (1, "raise ArithmeticError('not my day')", "ArithmeticError: not my day"),
        (0, "sys.exit('I have had enough')", "rank 0 called sys.exit('I have had enough')"),
    ],
)
def test_a_users_model_that_fails_on_one_rank(run_job, small, tmp_path, rank, statement, said):
    (tmp_path / "failing.py").write_text(MODEL.format(rank=rank, statement=statement))
    run = tmp_path / "run"
    job = run_job(2, "train.py", *small, "--steps", "2", "--model", "failing:build", "--run-dir", run)
    assert job.code == 70, job.output
    assert job.ended_at - float((tmp_path / "failed.txt").read_text()) < TOGETHER_S
    assert job.output.count(said) == 1, job.output
    assert job.output.count("failing.py") == 1, job.output  # where it happened
    assert job.output.count("Traceback") == ("raise" in statement), job.output
    assert not run.exists()  # a start that fails leaves no run


OVERLAPPED = """
import numpy as np
import tf_dist
from tf_dist.parallel import buckets

buckets.BUCKET_BYTES, buckets.LAST_BUCKET_BYTES = 4096, 1024
comm = tf_dist.connect()
import keras

tokens = keras.Input((8,), dtype="int32")
x = keras.layers.Dense(64)(keras.layers.Dense(64)(keras.layers.Embedding(29, 64)(tokens)))
model = keras.Model(tokens, keras.layers.Dense(29)(x))
trainer = tf_dist.Trainer(
    model, keras.optimizers.Adam(), comm, global_batch_size=12, micro_batch_size=2,
    clip_norm=0.0, overlap="on",
)
steps, add = 0, buckets.Buckets.add

def fails(self, number, gradients):
    global steps
    steps += number == 0
    if steps == 3 and number == 2 and {where}:
        raise RuntimeError("the words of a hook")
    add(self, number, gradients)

buckets.Buckets.add = fails
trainer.fit(np.arange(5000) % 29, steps=10)
"""


@pytest.mark.parametrize(
    "where",
    [
        "comm.rank == 1",
        *(pytest.param(one, marks=pytest.mark.extended) for one in ("comm.rank == 0", "True")),
    ],
)
def test_a_failure_inside_the_backward_pass_while_gradients_leave(run_job, tmp_path, where):
    """Some buckets are on their way, others will never be: on one rank, or on all of them."""
    (tmp_path / "job.py").write_text(OVERLAPPED.format(where=where))
    job = run_job(3, "job.py", timeout=90)  # nobody hangs; ranks with TensorFlow take seconds to leave
    assert job.code == 70, job.output
    assert "the words of a hook" in job.output


# Jobs that were started wrongly --------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK")]
)
def test_an_mpirun_of_another_mpi(start_job, small, names, one_error):
    """It starts N processes, each of which sees an MPI world of 1 and would train alone."""
    ranks = [{names[0]: "4", names[1]: str(rank)} for rank in (0, 3)]
    jobs = [start_job(0, "train.py", *small, "--steps", "2", env=environment) for environment in ranks]
    first, last = (job.wait() for job in jobs)
    one_error(first, 78, "the launcher started 4 processes, but each sees an MPI world of 1")
    assert (last.code, last.output) == (78, "")


def test_ranks_with_different_configurations(launcher, small, tmp_path, one_error):
    """`mpirun -np 1 A : -np 1 B` does it here; a forgotten `git pull` on one node does it in life."""
    flags = ["train.py", *small, "--run-dir", tmp_path / "run"]
    parts = [(1, [*flags, "--seed", "1"]), (1, [*flags, "--seed", "2", "--width", "32"])]
    job = launcher.start_parts(parts, cwd=tmp_path).wait()
    one_error(job, 78, "do not agree", "seed: 1 on rank 0, 2 on rank 1", "width: 16 on rank 0, 32 on rank 1")
    assert not (tmp_path / "run").exists(), "something was begun"


def test_ranks_with_different_versions(launcher, small, tmp_path, one_error):
    """One node's environment was not upgraded: its packages are found first on rank 1."""
    (tmp_path / "old" / "keras-3.0.0.dist-info").mkdir(parents=True)
    (tmp_path / "old" / "keras-3.0.0.dist-info" / "METADATA").write_text("Name: keras\nVersion: 3.0.0\n")
    flags = ["train.py", *small, "--steps", "2", "--run-dir", tmp_path / "run"]
    old = ("-x", f"PYTHONPATH={tmp_path / 'old'}")
    job = launcher.start_parts([(1, flags), (1, [old, *flags])], cwd=tmp_path).wait()
    one_error(job, 78, "do not agree", "keras: 3.", " on rank 0, 3.0.0 on rank 1")
    assert not (tmp_path / "run").exists(), "something was begun"


def test_ranks_with_different_data(launcher, small, corpus, tmp_path, one_error):
    """Two nodes with disks of their own, one of them with an older copy of the text."""
    for name, ending in (("a", ""), ("b", "one more line\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(corpus.read_text() + ending)
    flags = ["train.py", *small, "--data", "text.txt", "--prepared-dir", "prepared", "--run-dir", "run"]
    parts = [(1, [("--wdir", tmp_path / name), *flags]) for name in ("a", "b")]
    job = launcher.start_parts(parts, cwd=tmp_path).wait()
    one_error(job, 78, "the ranks do not agree on the data", "content_sha256: ", " on rank 0, ")
    assert not list(tmp_path.glob("*/run/metrics.jsonl"))


def test_ranks_with_different_tokens_beside_equal_facts(launcher, small, corpus, tmp_path, one_error):
    """A disk of one node has spoiled its tokens; what is said of them beside is the same everywhere."""
    flags = [*small, "--prepared-dir", "prepared"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    only_data = [word for word in flags if word in ("--data", str(corpus), "--tokenizer", "byte")]
    made = launcher.start(
        0, "prepare.py", *only_data, "--prepared-dir", "prepared", cwd=tmp_path / "a"
    ).wait()
    assert made.code == 0, made.output
    shutil.copytree(tmp_path / "a" / "prepared", tmp_path / "b" / "prepared")
    (tokens,) = (tmp_path / "b" / "prepared").glob("*/train.bin")
    raw = bytearray(tokens.read_bytes())
    raw[len(raw) // 2] ^= 1
    tokens.write_bytes(raw)
    flags = ["train.py", *flags, "--run-dir", "run"]
    parts = [(1, [("--wdir", tmp_path / name), *flags]) for name in ("a", "b")]
    job = launcher.start_parts(parts, cwd=tmp_path).wait()
    one_error(
        job, 65, f"rank 1: the tokens in {tokens.parent} have changed since they were prepared", "train.bin"
    )
    assert not list(tmp_path.glob("*/run/metrics.jsonl"))
