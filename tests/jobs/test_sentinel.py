"""A bit that flips on one rank of ``scripts/train.py``, and loops of one's own that end with our errors."""

import json

import pytest

# Flips a bit of a weight on the last of some ranks before the seventh step.
MODEL = """
import keras
import numpy as np
from tf_dist.training.trainer import Trainer

train_step = Trainer.train_step

def train_step_with_an_accident(self, *batch):
    if {flips} and self.step == 6 and self.comm.rank == self.comm.size - 1:
        weight = self.model.weights[1]
        array = np.array(weight.value)
        array.reshape(-1).view(np.uint8)[3] ^= 64
        weight.assign(array)
    return train_step(self, *batch)

def build(config):
    Trainer.train_step = train_step_with_an_accident
    tokens = keras.Input((config.seq_len,), dtype="int32")
    x = keras.layers.Embedding(config.vocab_size, 8)(tokens)
    return keras.Model(tokens, keras.layers.Dense(config.vocab_size)(x))
"""


@pytest.fixture
def flags(small, tmp_path):
    """Flags of a run of twelve steps whose model module is ``accident.py``."""
    names = {True: "accident", False: "no_accident"}
    for flips, name in names.items():
        (tmp_path / f"{name}.py").write_text(MODEL.format(flips=flips))

    def of(name, flips=True):
        more = ["--steps", "12", "--model", f"{names[flips]}:build", "--run-dir", tmp_path / name]
        return [*small, *more, "--check-every", "2", "--threads-per-rank", "1"]

    return of


def test_a_flipped_bit_stops_the_run(run_job, flags, tmp_path, one_error):
    job = run_job(3, "train.py", *flags("run"))
    one_error(job, 78, "before step 7 the ranks no longer hold")
    assert job.output.count("rank 2 differs from ranks 0, 1 in dense/kernel") == 1, job.output
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 78)


def test_a_flipped_bit_is_put_right(launcher, flags, tmp_path):
    runs = [flags("undisturbed", flips=False), [*flags("restored"), "--on-mismatch", "restore"]]
    job = launcher.several(3, "train.py", runs, cwd=tmp_path).wait()
    assert job.code == 0, job.output
    assert job.output.count("rank 2 differs from ranks 0, 1") == 1
    assert "Restored from the others" in job.output
    undisturbed, restored = (
        json.loads((tmp_path / name / "status.json").read_text()) for name in ("undisturbed", "restored")
    )
    assert restored["weights_sha256"] == undisturbed["weights_sha256"]
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
