"""Whether XLA compiles forward and backward: by a clock where asked to, and as before on a resume."""

import threading
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from thread_comm import on_ranks

from tf_dist.checkpoint import store
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import UsageError
from tf_dist.training import state_dict, xla_autotune
from tf_dist.training.trainer import Trainer, weights_sha256
from tf_dist.training.xla_autotune import XlaAutotune

V, T, G = 11, 8, 8
TOKENS = np.resize(np.arange(V, dtype=np.uint16), 601)


class Clock(threading.local):
    """Stands still, but for what gradients take on this thread, which is a rank."""

    now = 0.0

    def perf_counter(self):
        return self.now


CLOCK = Clock()


@pytest.fixture(autouse=True)
def no_other_clock(monkeypatch):
    monkeypatch.setattr(xla_autotune, "time", SimpleNamespace(perf_counter=CLOCK.perf_counter))


class Timed:
    """A replica whose gradients take as long as they are told to."""

    rows, seq_len, target_len, xla = 1, 2, 2, False

    def __init__(self, with_s=0.0, without_s=0.0, broken=False):
        self.with_s, self.without_s, self.broken = with_s, without_s, broken

    def use_xla(self, xla):
        self.xla = xla

    def gradients(self, x, y, draw):
        if self.xla and self.broken:
            raise tf.errors.InvalidArgumentError(None, None, "no such kernel\nand more")
        CLOCK.now += self.with_s if self.xla else self.without_s


def chosen(replica, autotune="full", xla="auto", before=None):
    made = XlaAutotune(replica, SerialComm(), autotune, xla)
    if before is not None:
        made.restore(before)
    made.choose()
    return replica.xla, made.description


def trainer_of(dropout=0.2, **values):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((T,), dtype="int32"),
            layers.Embedding(V, 16),
            layers.Dropout(dropout),
            layers.Dense(16, activation="gelu"),
            layers.LayerNormalization(),
            layers.Dense(V),
        ]
    )
    optimizer = keras.optimizers.Adam(1e-2)
    return Trainer(
        model, optimizer, SerialComm(), clip_norm=0.0, global_batch_size=G, micro_batch_size=4, **values
    )


@pytest.mark.parametrize(
    ("with_s", "without_s", "xla"), [(0.0, 0.02, True), (0.02, 0.0, False), (0.02, 0.02, False)]
)
def test_the_faster_one_by_enough(with_s, without_s, xla):
    found, said = chosen(Timed(with_s, without_s))
    assert found is xla
    assert said.startswith("by XLA: " if xla else "without XLA: ") and said.count(" ms") == 2


def test_the_slowest_rank_decides_for_all():
    def work(comm):
        replica = Timed(0.03 if comm.rank else 0.0, 0.01)
        made = XlaAutotune(replica, comm, "full", "auto")
        made.choose()
        return replica.xla, made.description

    first, second = on_ranks(2, work)
    assert first == second
    assert first[0] is False


@pytest.mark.parametrize("autotune", ["exact", "off"])
def test_nothing_that_changes_bits_is_tried_unless_it_was_asked_for(autotune):
    found, said = chosen(Timed(0.0, 0.01, broken=True), autotune)
    assert found is False and "--autotune full" in said


@pytest.mark.parametrize("autotune", ["full", "off"])
@pytest.mark.parametrize("xla", ["on", "off"])
def test_what_was_asked_for(autotune, xla):
    found, said = chosen(Timed(), autotune, xla, before=xla != "on")
    assert found is (xla == "on") and "as was asked for" in said


@pytest.mark.parametrize("before", [True, False])
def test_a_resume_does_as_before_without_a_clock(before):
    slow = Timed(0.0 if not before else 0.01, 0.01 if not before else 0.0)
    found, said = chosen(slow, before=before)
    assert found is before and "as before" in said


def test_a_model_that_xla_cannot_compile():
    found, said = chosen(Timed(broken=True))
    assert found is False and "cannot compile this model (no such kernel)" in said
    with pytest.raises(UsageError, match=r"--xla on: XLA cannot compile .*no such kernel.*--xla off"):
        chosen(Timed(broken=True), xla="on")


def test_a_real_model_that_xla_cannot_compile():
    def from_python(x):
        return tf.ensure_shape(tf.numpy_function(lambda a: a, [x], tf.float32), x.shape)

    model = keras.Sequential(
        [keras.Input((T,), dtype="int32"), layers.Embedding(V, V), layers.Lambda(from_python)]
    )
    trainer = Trainer(
        model, keras.optimizers.SGD(1.0), SerialComm(), clip_norm=0.0, global_batch_size=G, xla="on"
    )
    with pytest.raises(UsageError, match="--xla off"):
        trainer.fit(TOKENS, steps=1)


@pytest.mark.parametrize("values", [{"autotune": "never"}, {"xla": "maybe"}])
def test_unknown_words(values):
    with pytest.raises(UsageError, match="choose one of"):
        trainer_of(**values)


def test_xla_gives_the_same_to_within_rounding():
    with_xla, without = (trainer_of(dropout=0.0, xla=xla) for xla in ("on", "off"))
    found = [trainer.fit(TOKENS, steps=20)["loss"] for trainer in (with_xla, without)]
    assert with_xla.replica.xla and not without.replica.xla
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_a_resume_is_exact_though_nobody_asks_again(tmp_path):
    whole = trainer_of(xla="on")
    whole.fit(TOKENS, steps=4)
    state_dict.save(whole, tmp_path, 1, {})
    whole.fit(TOKENS, steps=4)
    resumed = trainer_of()
    state_dict.restore(resumed, store.newest(tmp_path))
    resumed.fit(TOKENS, steps=8)
    assert resumed.replica.xla
    assert weights_sha256(resumed.model) == weights_sha256(whole.model)
