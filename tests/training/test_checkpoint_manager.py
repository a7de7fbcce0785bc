"""Checkpoints that are written while a training goes on: what is on the disk, when, and what goes wrong."""

import contextlib
import json
import os
import threading

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist.checkpoint import async_writer, manifest, shards, store
from tf_dist.checkpoint.async_writer import AsyncWriter, WritePlan
from tf_dist.checkpoint.shards import TensorSpec
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import CheckpointError
from tf_dist.run.run_callbacks import SaveRun
from tf_dist.training import checkpoint_manager, checkpoint_reader, state_dict
from tf_dist.training.checkpoint_manager import CheckpointManager
from tf_dist.training.snapshot import recover, snapshot_of
from tf_dist.training.trainer import Trainer

V, T, G = 11, 8, 8
TOKENS = np.resize(np.arange(V, dtype=np.uint16), 601)


def trainer():
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, V), layers.Dense(V)])
    return Trainer(
        model,
        keras.optimizers.Adam(0.1),
        SerialComm(),
        clip_norm=0.0,
        global_batch_size=G,
        micro_batch_size=4,
    )


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
    saver = CheckpointManager(one.comm, tmp_path, 3)
    saver.begin(snapshot_of(one, {"val_loss": 2.5}))
    assert saver.news() is None and store.listing(tmp_path) == []
    one.fit(TOKENS, steps=2)
    held.set()
    assert saver.settle() == {"step": 2, "weights_sha256": sha, "val_loss": 2.5}
    tensors, facts, step = store.load(tmp_path / "step-00000002")
    assert step == 2 and facts["tokens"] == 2 * G * T
    for found, array in zip(tensors.values(), wanted, strict=True):
        np.testing.assert_array_equal(found, array)


def in_format_2(path):
    """Rewrite a checkpoint as the release before safetensors wrote it."""
    made = {**manifest.read_manifest(path), "version": 2}
    for name, file in manifest.layout(made["tensors"]).items():
        (path / name).with_suffix(".bin").write_bytes((path / name).read_bytes()[len(file.header) :])
        (path / name).unlink()
    for entry in made["tensors"]:
        entry["file"] = entry["file"].replace(".safetensors", ".bin")
    (path / manifest.NAME).write_text(json.dumps({**made, "crc32": manifest.crc32_of(made)}))


def test_a_run_goes_on_from_an_older_format(tmp_path):
    """It is read, and the next checkpoint is of this format."""
    one, two = trainer(), trainer()
    one.fit(TOKENS, steps=2)
    path = store.path_of(tmp_path / "old", 2)
    state_dict.save(one, path.parent, 3, {})
    in_format_2(path)
    assert manifest.read_manifest(path)["version"] == 2
    state_dict.restore(two, path)
    assert two.step == 2 and two.check_equal() == one.check_equal()
    state_dict.save(two, tmp_path / "new", 3, {})
    old, new = store.load(path)[0], store.load(tmp_path / "new" / path.name)[0]
    assert manifest.read_manifest(tmp_path / "new" / path.name)["version"] == 3
    assert [array.tobytes() for array in old.values()] == [array.tobytes() for array in new.values()]


def test_a_record_may_get_its_name_between_two_looks(tmp_path, monkeypatch):
    """The first rank looks at the sizes of files that others are renaming."""
    (tmp_path / "there").write_bytes(b"1234")

    class Gone:
        def stat(self, **_):
            raise FileNotFoundError

    with os.scandir(tmp_path) as found:
        entries = [*found, Gone()]
    monkeypatch.setattr(os, "scandir", lambda _: contextlib.nullcontext(entries))
    assert async_writer._bytes_in(tmp_path) == 4


def test_news_are_told_once(tmp_path):
    one = trainer()
    saver = CheckpointManager(one.comm, tmp_path, 3)
    saver.begin(snapshot_of(one))
    saver._flight.ended()
    assert saver.news()["step"] == 0 and saver.news() is None
    saver.settle()
    assert saver.news() is None
    assert saver.settle() is None


def test_memory_is_used_again(tmp_path):
    one = trainer()
    saver = CheckpointManager(one.comm, tmp_path, 3)
    saver.save(snapshot_of(one))
    room = saver._room
    assert room.size == sum(entry.size_bytes for entry in one.whole().entries)
    one.fit(TOKENS, steps=1)
    saver.save(snapshot_of(one))
    assert saver._room is room


def test_where_there_is_no_room_for_copies_nothing_is_copied(tmp_path, monkeypatch, told):
    """What is saved is then on the disk before training goes on; it is said once."""
    monkeypatch.setattr(checkpoint_manager, "has_room", lambda wanted, ranks: False)
    one = trainer()
    one.fit(TOKENS, steps=2)
    saver = CheckpointManager(one.comm, tmp_path, 3)
    for _ in range(2):
        saver.begin(snapshot_of(one))
        assert saver.settle()["step"] == 2
    said = told.messages
    assert saver._room.size == 0 and len(said) == 1 and "no memory for a copy" in said[0]


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_fails(tmp_path, monkeypatch, background):
    """Said before the next step, by the next save, and at the end; never reported as saved."""
    one = trainer()
    saver = CheckpointManager(one.comm, tmp_path, 3, background)
    saver.save(snapshot_of(one))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write_shard", full)
    one.fit(TOKENS, steps=1)
    for hear in (saver.news, saver.settle, lambda: saver.begin(snapshot_of(one))):
        saver.begin(snapshot_of(one))
        saver._flight.ended()
        with pytest.raises(CheckpointError, match=r"No space left on device. Older .* untouched"):
            hear()
        saver._flight = None
    assert store.newest(tmp_path).name == "step-00000000"
    assert (tmp_path / "latest").read_text() == "step-00000000\n"


def test_the_end_of_a_training_is_on_the_disk(tmp_path):
    one, told = trainer(), []
    saver = CheckpointManager(one.comm, tmp_path, 9)
    save = SaveRun(
        one,
        2,
        lambda: saver.begin(snapshot_of(one)),
        lambda: saver.save(snapshot_of(one)),
        saver.news,
        told.append,
    )
    one.fit(TOKENS, steps=5, callbacks=[save])
    assert [made["step"] for made in told] == [5]
    assert told[0]["weights_sha256"] == one.check_equal()
    assert [store.verify(path)["step"] for path in store.listing(tmp_path)] == [2, 4, 5]
    again = trainer()
    state_dict.restore(again, tmp_path / "step-00000005")
    assert again.check_equal() == one.check_equal()


# The best one --------------------------------------------------------------------------------------


def test_the_lowest_validation_loss_is_kept(tmp_path):
    """Only where it is of the step that is saved; a number that is none is never the best."""
    one = trainer()
    saver = CheckpointManager(one.comm, tmp_path, 1)
    validated = [(1, 3.0), (2, 2.0), (2, 1.0), (4, 2.5), (5, float("nan"))]
    for step, (at, loss) in enumerate(validated, 1):
        one.state.step = step
        saver.save(snapshot_of(one, {"val_loss": loss, "val_loss_step": at}))
    assert [path.name for path in store.listing(tmp_path)] == ["step-00000002", "step-00000005"]
    assert store.best(tmp_path) == tmp_path / "step-00000002"
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    one.state.step = 6
    saver.save(snapshot_of(one, {"val_loss": 1.5, "val_loss_step": 6}))
    assert [path.name for path in store.listing(tmp_path)] == ["step-00000006"]
    assert store.best(tmp_path) == tmp_path / "step-00000006"


@pytest.mark.parametrize("said", [b"", b"../step-00000002", b"step-00000009", b"\xff" * 100, b"/etc"])
def test_what_best_says_is_not_trusted(tmp_path, said):
    store.save(tmp_path, 2, {}, {})
    assert store.best(tmp_path) is None
    (tmp_path / "best").write_bytes(said)
    assert store.best(tmp_path) is None


# Several ranks, one of which does not write ------------------------------------------------------------


def plan(folder):
    final = store.path_of(folder, 7)
    return WritePlan(shards.begin(final), final, {}, [0, 1], 3)


def test_a_checkpoint_waits_for_all_shards(tmp_path):
    made = plan(tmp_path)
    a, b = TensorSpec(0, "weights/0000/a", (3,), "float32"), TensorSpec(1, "weights/0001/b", (2,), "int8")
    first, second = AsyncWriter(made, 0, specs=[a]), AsyncWriter(made, 1, specs=[b])
    first.start([(0, "weights/0000/a", np.ones(3, np.float32))])
    assert first.written() is None and not first.over and store.listing(tmp_path) == []
    second.start([(1, "weights/0001/b", np.zeros(2, np.int8))])
    assert first.ended()["step"] == 7 and second.ended() is None
    assert list(store.load(made.final)[0]) == ["weights/0000/a", "weights/0001/b"]


def test_who_dies_before_it_has_written_leaves_no_checkpoint(tmp_path):
    made = plan(tmp_path)
    first = AsyncWriter(made, 0)
    first.start([])
    first.give_up()
    assert first.ended() is None and first.error is None
    first.remove_incomplete()
    assert list(tmp_path.iterdir()) == []


def test_who_does_not_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(async_writer, "STANDSTILL_S", 0.05)
    first = AsyncWriter(plan(tmp_path), 0)
    first.start([])
    assert first.ended() is None and "nothing has come from rank 1" in first.error


# What is restored ----------------------------------------------------------------------------------------


def two_steps_apart(folder):
    """A trainer of step 4 whose checkpoints are of steps 2 and 4, and what was saved in them."""
    one = trainer()
    saver, shas = CheckpointManager(one.comm, folder, 3), {}
    for step in (2, 4):
        one.fit(TOKENS, steps=2)
        shas[step] = saver.save(snapshot_of(one))["weights_sha256"]
    return saver, shas


def damage_the_end_of(path):
    """Flip a bit of the tensor that is read last: of the optimizer's state."""
    last = manifest.read_manifest(path)["tensors"][-1]
    head = manifest.layout(manifest.read_manifest(path)["tensors"])[last["file"]].header
    raw = bytearray((path / last["file"]).read_bytes())
    raw[len(head) + last["offset"]] ^= 1
    (path / last["file"]).write_bytes(raw)


@pytest.mark.parametrize("room", [True, False])
def test_damage_at_the_end_leaves_all_as_it_was(tmp_path, monkeypatch, told, room):
    """With memory for a copy each byte is read once; without, the checkpoint is verified before."""
    monkeypatch.setattr(checkpoint_reader, "has_room", lambda wanted, ranks: room)
    saver, shas = two_steps_apart(tmp_path)
    damage_the_end_of(tmp_path / "step-00000004")
    two = trainer()
    two.fit(TOKENS, steps=3)
    before = [np.array(array) for _, array in two.whole().tensors()]
    with pytest.raises(CheckpointError, match=r"step-00000004/shard.* is damaged \(CRC-32\)"):
        state_dict.restore(two, tmp_path / "step-00000004")
    assert two.step == 3
    for (name, array), was in zip(two.whole().tensors(), before, strict=True):
        assert np.array_equal(array, was), name
    found = recover([saver], two)
    assert (found.step, two.step) == (2, 2) and two.check_equal() == shas[2]
    assert [line[:23] for line in told.messages] == ["skipping step-00000004: "[:23]]
    two.fit(TOKENS, steps=4)
    assert two.check_equal() == shas[4]


def test_damage_that_appears_while_a_checkpoint_is_read_ends_the_run(tmp_path, monkeypatch):
    """Where memory lacks a copy: no older one, as weights are overwritten already."""
    monkeypatch.setattr(checkpoint_reader, "has_room", lambda wanted, ranks: False)
    saver, _ = two_steps_apart(tmp_path)
    verify = store.verify

    def verified(path):
        verify(path)
        damage_the_end_of(path)

    monkeypatch.setattr(store, "verify", verified)
    with pytest.raises(CheckpointError, match="It was valid a moment ago"):
        recover([saver], trainer())
