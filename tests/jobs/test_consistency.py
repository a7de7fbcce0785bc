"""A bit that flips on one rank of ``scripts/train.py``, and loops of one's own that end with our errors."""

import json

import pytest

FLIP = "bitflip:rank=2,step={step},seed=3,phase={phase}"


def test_a_flipped_bit_stops_the_run(run_job, small, tmp_path, one_error):
    flags = ["--steps", "12", "--check-every", "2", "--threads-per-rank", "1", "--run-dir", tmp_path / "run"]
    fault = {"TF_DIST_FAULT": FLIP.format(step=7, phase="step")}
    job = run_job(3, "train.py", *small, *flags, env=fault)
    one_error(job, 78, "before step 7 the ranks no longer hold")
    assert job.output.count("rank 2 differs from ranks 0, 1 in ") == 1, job.output
    assert "armed by TF_DIST_FAULT: bitflip on rank 2 in phase step, from step 7 on" in job.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 78)


def test_a_flipped_bit_is_put_right(run_job, first_run, tmp_path):
    """It has spoiled the gradients of ten steps, which all ranks have taken."""
    flags = ["--check-every", "50", "--on-mismatch", "restore", "--threads-per-rank", "1"]
    fault = {"TF_DIST_FAULT": FLIP.format(step=31, phase="forward")}
    job = run_job(3, "train.py", *first_run.flags, *flags, "--run-dir", tmp_path / "restored", env=fault)
    assert job.code == 0, job.output
    assert (
        job.output.count("before step 41 the ranks no longer hold the same model: rank 2 differs from") == 1
    )
    assert "Restored from the others, and steps 21 to 40 were taken again" in job.output
    restored = json.loads((tmp_path / "restored" / "status.json").read_text())
    assert restored["val_loss"] == first_run.status["val_loss"]
    assert restored["weights_sha256"] == first_run.status["weights_sha256"]
    assert restored["state"] == "done"


LOOP = """
import tf_dist
comm = tf_dist.connect()
import keras
import tensorflow as tf

weight = keras.Variable([1.0, 2.0])
optimizer = tf_dist.distribute(keras.optimizers.SGD(0.1), comm)
optimizer.build([weight])

@tf.function(jit_compile={xla})
def step(gradient):
    optimizer.apply([gradient], [weight])

for i in range(3 + {more}):
    step(tf.ones(2))
{end}
print("DONE", flush=True)
"""

END = "optimizer.finalize_variable_values([weight])"
LOOPS = {
    # name: (XLA, steps more than 3, what stands after the loop, exit code, what is said)
    "another number of steps": (
        False, "comm.rank", END, 78,
        "error: 1 of 2 ranks have ended their training, or its epoch, while the others go on",
    ),
    "another number of steps, and no word at the end": (
        False, "comm.rank", "", 70, "rank 0 left the job while rank 1 waits for it in allreduce",
    ),
    "XLA": (True, "0", END, 64, "error: a distributed optimizer cannot be called inside jit_compile=True"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOPS)
def test_our_errors_come_out_of_a_graph_as_ours(run_job, tmp_path, name):
    xla, more, end, code, said = LOOPS[name]
    (tmp_path / "loop.py").write_text(LOOP.format(xla=xla, more=more, end=end))
    job = run_job(2, "loop.py", timeout=90)
    assert job.code == code, job.output
    assert job.output.count(said) == 1, job.output
    assert job.output.count("error:") == ("error:" in said), job.output
    assert "Traceback" not in job.output, job.output
    assert job.output.count("DONE") == (1 if not end else 0), job.output
