"""TensorFlow really uses the number of threads that the banner names."""

import re

import pytest

pytestmark = pytest.mark.cold

# Counted inside the ranks, around TensorFlow's first operation, which starts its pool.
MODEL = """
import os
from pathlib import Path

def threads():
    tasks = Path("/proc/self/task").iterdir()
    names = [(task / "comm").read_text().strip() for task in tasks]
    return len([name for name in names if not name.startswith(("tf_", "jemalloc"))])

def build(config):
    import keras
    import tensorflow as tf

    before = threads()
    tf.linalg.matmul(tf.ones((300, 300)), tf.ones((300, 300)))
    started = threads() - before
    Path(f"threads-{os.environ['OMPI_COMM_WORLD_RANK']}.txt").write_text(str(started))
    tokens = keras.Input((config.seq_len,), dtype="int32")
    x = keras.layers.Embedding(config.vocab_size, 8)(tokens)
    return keras.Model(tokens, keras.layers.Dense(config.vocab_size)(x))
"""


def test_threads_are_those_of_the_banner(run_job, small, tmp_path):
    """How many there are where none are asked for is arithmetic: `tests/comm/test_thread_budget.py`."""
    asked = 3
    (tmp_path / "counting.py").write_text(MODEL)
    flags = [*small, "--steps", "1", "--model", "counting:build", "--threads-per-rank", asked]
    job = run_job(2, "train.py", *flags, "--run-dir", tmp_path / "run")
    assert job.code == 0, job.output
    named = int(re.search(r"2 ranks on 1 node .*, (\d+) threads? each", job.output)[1])
    assert named == asked
    started = [int((tmp_path / f"threads-{rank}.txt").read_text()) for rank in range(2)]
    assert started == [named, named]
