"""Checkpoints that are written while a training goes on: what is on the disk, when, and what goes wrong."""

import contextlib
import os
import threading

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist.comm.base import SerialComm
from tf_dist.errors import CheckpointError
from tf_dist.training import checkpoint, flight, saving, shards, state
from tf_dist.training.flight import Flight, Plan
from tf_dist.training.run_callbacks import SaveRun
from tf_dist.training.saving import Saver
from tf_dist.training.trainer import Trainer

V, T, G = 11, 8, 8
TOKENS = np.resize(np.arange(V, dtype=np.uint16), 601)


def trainer():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V), layers.Dense(V)])
    return Trainer(model, keras.optimizers.Adam(0.1), SerialComm(), global_batch_size=G, micro_batch_size=4)


@pytest.fixture
def held(monkeypatch):
    """A disk that takes nothing until this is set."""
    release, write = threading.Event(), shards.write_shard

    def slow(*arguments):
        assert release.wait(60)
        write(*arguments)

    monkeypatch.setattr(shards, "write_shard", slow)
    yield release
    release.set()


def test_what_is_saved_is_of_its_moment(tmp_path, held):
    """Weights change while they are being written."""
    one = trainer()
    one.fit(TOKENS, steps=2)
    wanted = [np.array(array) for _, array in one.whole().tensors()]
    sha = one.check_equal()
    saver = Saver(one, tmp_path, 3)
    saver.begin({"val_loss": 2.5})
    assert saver.news() is None and checkpoint.listing(tmp_path) == []
    one.fit(TOKENS, steps=2)
    held.set()
    assert saver.settle() == {"step": 2, "weights_sha256": sha, "val_loss": 2.5}
    tensors, facts, step = checkpoint.load(tmp_path / "step-00000002")
    assert step == 2 and facts["tokens"] == 2 * G * T
    for found, array in zip(tensors.values(), wanted, strict=True):
        np.testing.assert_array_equal(found, array)


def test_a_record_may_get_its_name_between_two_looks(tmp_path, monkeypatch):
    """The first rank looks at the sizes of files that others are renaming."""
    (tmp_path / "there").write_bytes(b"1234")

    class Gone:
        def stat(self, **_):
            raise FileNotFoundError

    with os.scandir(tmp_path) as found:
        entries = [*found, Gone()]
    monkeypatch.setattr(os, "scandir", lambda _: contextlib.nullcontext(entries))
    assert flight._bytes_in(tmp_path) == 4


def test_news_are_told_once(tmp_path):
    one = trainer()
    saver = Saver(one, tmp_path, 3)
    saver.begin({})
    saver._flight.ended()
    assert saver.news()["step"] == 0 and saver.news() is None
    saver.settle()
    assert saver.news() is None
    assert saver.settle() is None


def test_memory_is_used_again(tmp_path):
    one = trainer()
    saver = Saver(one, tmp_path, 3)
    saver.save({})
    room = saver._room
    assert room.size == sum(entry.size_bytes for entry in one.whole().entries)
    one.fit(TOKENS, steps=1)
    saver.save({})
    assert saver._room is room


def test_where_there_is_no_room_for_copies_nothing_is_copied(tmp_path, monkeypatch):
    """What is saved is then on the disk before training goes on; it is said once."""
    monkeypatch.setattr(saving, "has_room", lambda wanted, ranks: False)
    one, said = trainer(), []
    one.fit(TOKENS, steps=2)
    saver = Saver(one, tmp_path, 3, say=said.append)
    for _ in range(2):
        saver.begin({})
        assert saver.settle()["step"] == 2
    assert saver._room.size == 0 and len(said) == 1 and "no room for a copy" in said[0]


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fails(tmp_path, monkeypatch, background):
    """Said before the next step, by the next save, and at the end; never reported as saved."""
    one = trainer()
    saver = Saver(one, tmp_path, 3, background)
    saver.save({})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_shard", full)
    one.fit(TOKENS, steps=1)
    for hear in (saver.news, saver.settle, lambda: saver.begin({})):
        saver.begin({})
        saver._flight.ended()
        with pytest.raises(CheckpointError, match=r"No space left on device. Older .* untouched"):
            hear()
        saver._flight = None
    assert checkpoint.newest(tmp_path).name == "step-00000000"
    assert (tmp_path / "latest").read_text() == "step-00000000\n"


def test_the_end_of_a_training_is_on_the_disk(tmp_path):
    one, told = trainer(), []
    saver = Saver(one, tmp_path, 9)
    save = SaveRun(one, 2, lambda: saver.begin({}), lambda: saver.save({}), saver.news, told.append)
    one.fit(TOKENS, steps=5, callbacks=[save])
    assert [made["step"] for made in told] == [5]
    assert told[0]["weights_sha256"] == one.check_equal()
    assert [checkpoint.verify(path)["step"] for path in checkpoint.listing(tmp_path)] == [2, 4, 5]
    again = trainer()
    state.restore(again, tmp_path / "step-00000005")
    assert again.check_equal() == one.check_equal()


# The best one --------------------------------------------------------------------------------------


def test_the_lowest_validation_loss_is_kept(tmp_path):
    """Only where it is of the step that is saved; a number that is none is never the best."""
    one = trainer()
    saver = Saver(one, tmp_path, 1)
    validated = [(1, 3.0), (2, 2.0), (2, 1.0), (4, 2.5), (5, float("nan"))]
    for step, (at, loss) in enumerate(validated, 1):
        one.step = step
        saver.save({"val_loss": loss, "val_loss_step": at})
    assert [path.name for path in checkpoint.listing(tmp_path)] == ["step-00000002", "step-00000005"]
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000002"
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    one.step = 6
    saver.save({"val_loss": 1.5, "val_loss_step": 6})
    assert [path.name for path in checkpoint.listing(tmp_path)] == ["step-00000006"]
    assert checkpoint.best(tmp_path) == tmp_path / "step-00000006"


@pytest.mark.parametrize("said", [b"", b"../step-00000002", b"step-00000009", b"\xff" * 100, b"/etc"])
def test_what_best_says_is_not_trusted(tmp_path, said):
    checkpoint.save(tmp_path, 2, {}, {})
    assert checkpoint.best(tmp_path) is None
    (tmp_path / "best").write_bytes(said)
    assert checkpoint.best(tmp_path) is None


# Several ranks, one of which does not write ------------------------------------------------------------


def plan(folder):
    final = checkpoint.path_of(folder, 7)
    return Plan(shards.begin(final), final, {}, [0, 1], 3)


def test_a_checkpoint_waits_for_all_shards(tmp_path):
    made = plan(tmp_path)
    first, second = Flight(made, 0), Flight(made, 1)
    first.start([(0, "weights/0000/a", np.ones(3, np.float32))])
    assert first.written() is None and not first.over and checkpoint.listing(tmp_path) == []
    second.start([(1, "weights/0001/b", np.zeros(2, np.int8))])
    assert first.ended()["step"] == 7 and second.ended() is None
    assert list(checkpoint.load(made.final)[0]) == ["weights/0000/a", "weights/0001/b"]


def test_who_dies_before_it_has_written_leaves_no_checkpoint(tmp_path):
    made = plan(tmp_path)
    first = Flight(made, 0)
    first.start([])
    first.give_up()
    assert first.ended() is None and first.error is None
    first.clear_away()
    assert list(tmp_path.iterdir()) == []


def test_who_does_not_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(flight, "STANDSTILL_S", 0.05)
    first = Flight(plan(tmp_path), 0)
    first.start([])
    assert first.ended() is None and "nothing has come from rank 1" in first.error
