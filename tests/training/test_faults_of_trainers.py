"""Every phase of TF_DIST_FAULT is a place that a training comes to."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist import faults
from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.faults.spec import OF_A_STEP, PHASES
from tf_dist.run.job import Job
from tf_dist.run.run_callbacks import SaveRun
from tf_dist.run.run_folder import RunFolder
from tf_dist.training.trainer import Trainer

V, T, G = 11, 4, 8
TOKENS = np.random.default_rng(1).integers(0, V, 900).astype(np.uint16)


@pytest.fixture(autouse=True)
def disarmed():
    yield
    faults.arm("", 0)


def made(update="allreduce", stage=1, **more):
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, 8), layers.Dense(V)])
    return Trainer(
        model, keras.optimizers.Adam(0.01), SerialComm(), update, zero_stage=stage, global_batch_size=G,
        clip_norm=0.0, micro_batch_size=4, seq_len=T, autotune="off", **more,
    )  # fmt: skip


def hit(phase, do, **keys):
    more = "".join(f",{key}={value}" for key, value in keys.items())
    faults.arm(f"raise:phase={phase}{more}", 0)
    with pytest.raises(faults.InjectedFault, match=f"in phase {phase}"):
        do()
    faults.arm("", 0)


@pytest.mark.parametrize(
    ("update", "stage"), [("allreduce", 1), ("master", 1), ("zero", 1), ("zero", 2), ("zero", 3)]
)
def test_of_a_step(update, stage):
    """Until the last of them nothing has changed, so that the step can be taken after all."""
    calm, trainer = made(update, stage), made(update, stage)
    sequences = trainer.sequences(TOKENS)
    sampler = trainer.sampler(sequences)
    for one in (calm, trainer):
        one.train_step(sequences, sampler)
    for phase in OF_A_STEP:
        hit(phase, lambda: trainer.train_step(sequences, sampler), step=2)
        assert trainer.step == 1
    for one in (calm, trainer):
        one.train_step(sequences, sampler)
    assert trainer.check_equal() == calm.check_equal()


def test_beside_steps(tmp_path):
    assert set(PHASES) == {*OF_A_STEP, "validation", "save", "load"}
    trainer = made()
    hit("validation", lambda: trainer.fit(TOKENS, steps=4, validation=TOKENS[:50], eval_every=2), step=2)
    assert trainer.step == 2
    run = RunFolder(tmp_path, SerialComm())
    run.open()
    corpus = SimpleNamespace(meta={"content_sha256": "of some text"})
    corpus.verify = corpus.check_unchanged = lambda: None
    job = Job(Config(async_save="off"), SerialComm(), corpus, run, trainer)
    hit("save", lambda: trainer.fit(TOKENS, steps=6, callbacks=[SaveRun(trainer, 2, job.save)]), step=4)
    assert trainer.step == 4
    job.save()
    hit("load", job.resume)
    job.resume()


@pytest.mark.parametrize("bits", [1, 32])
def test_a_flipped_bit_is_one_of_the_model(bits):
    calm, trainer = made(), made()
    sequences = trainer.sequences(TOKENS)
    sampler = trainer.sampler(sequences)
    faults.arm(f"bitflip:step=1,phase=update,seed=2,bits={bits}", 0)
    apply, seen = trainer.replica.apply, []
    trainer.replica.apply = lambda *arguments: seen.append(weights(trainer)) or apply(*arguments)
    trainer.train_step(sequences, sampler)
    differ = np.unpackbits(seen[0].view(np.uint8)) != np.unpackbits(weights(calm).view(np.uint8))
    assert differ.sum() == bits


def weights(trainer):
    return np.concatenate([np.asarray(v.value).reshape(-1) for v in trainer.model.trainable_variables])
