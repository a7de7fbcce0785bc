"""A run that is begun again, or goes on from an older checkpoint: one way, and each of its steps once."""

import contextlib
import dataclasses
import json
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist.checkpoint import store
from tf_dist.checkpoint.manifest import crc32_of, read_manifest
from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import CheckpointError, LaunchError
from tf_dist.run.job import Job
from tf_dist.run.run_callbacks import LogRun, SaveRun
from tf_dist.run.run_folder import RunFolder, read_metrics
from tf_dist.training.restart import Deaths
from tf_dist.training.trainer import Trainer

V, T, G = 11, 8, 8
TOKENS = np.resize(np.arange(V, dtype=np.uint16), 601)


class Killed(Exception):
    """Stands for the end of a process: nothing is put right."""


class Run:
    """A job on one rank in a folder; another one may have been there before."""

    def __init__(self, folder, resume="auto", rate=0.01, deaths=None):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, 8), layers.Dense(V)])
        self.trainer = Trainer(
            model, keras.optimizers.Adam(rate), SerialComm(), global_batch_size=G, micro_batch_size=G,
            clip_norm=0.0, seq_len=T, autotune="off",
        )  # fmt: skip
        self.folder = RunFolder(folder, SerialComm())
        self.folder.open()
        self.said = []
        say, self.folder.say = self.folder.say, self.said.append
        corpus = SimpleNamespace(meta={"content_sha256": "of some text"})
        corpus.verify = corpus.check_unchanged = lambda: None
        config = dataclasses.replace(Config(), resume=str(resume), learning_rate=rate, keep=100)
        self.job = Job(config, SerialComm(), corpus, self.folder, self.trainer, deaths)
        self.job.resume()
        self.folder.say = say

    def train(self, steps, killed_at=None, every=10):
        trainer, job = self.trainer, self.job

        class Kill(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                if trainer.step == killed_at:
                    job.checkpoints.settle()
                    raise Killed

        calls = [
            LogRun(trainer, self.folder, 1, 100),
            SaveRun(trainer, every, job.save, job.finish, job.poll, job.saved, job.is_elsewhere),
            Kill(),
        ]
        try:
            trainer.fit(TOKENS, steps=steps, callbacks=calls)
        except Killed:
            self.folder.later.drain()
        return trainer.check_equal()

    @property
    def steps(self):
        return [row["step"] for row in read_metrics(self.folder.metrics)]

    @property
    def saved(self):
        return [int(path.name[5:]) for path in store.listing(self.folder.checkpoints)]


def test_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    first = Run(tmp_path)
    first.train(20, killed_at=7)
    assert first.steps[:5] == [1, 2, 3, 4, 5] and first.saved == []
    again = Run(tmp_path)
    again.train(12)
    assert again.steps == list(range(1, 13))
    (left,) = tmp_path.glob("left-metrics-*.jsonl")
    assert read_metrics(left)[0]["step"] == 1
    assert any("lines of metrics.jsonl are now in left-metrics-" in line for line in again.said)


@pytest.mark.parametrize(
    "line",
    [b"5", b"{}", b"[1]", b'{"step": "x"}', b'{"step": null}', b'{"step": true}', b'{"step": -1}', b"[" * 100_000,  # noqa: E501
     b"\xff\xfe", b'{"step": 3, "loss": "low"}', b'{"step": 1' + b"0" * 40 + b"}", b"\0", b'{"step": 1' + b"0" * 5000 + b"}"],  # noqa: E501
    ids=range(13),
)  # fmt: skip
def test_lines_that_are_no_rows_do_not_end_a_resume(tmp_path, line):
    folder = RunFolder(tmp_path, SerialComm())
    folder.open()
    for step in (1, 2, 3):
        folder.log_metrics({"step": step, "loss": 1.0})
    with folder.metrics.open("ab") as file:
        file.write(line + b"\n")
    folder.log_metrics({"step": 4, "loss": 1.0})
    assert [row["step"] for row in read_metrics(folder.metrics)] == [1, 2, 3, 4]
    assert folder.keep_whole_rows(3)
    assert folder.metrics.read_bytes().count(b"\n") == 3


def test_of_rows_of_one_step_the_later_is_kept(tmp_path):
    """As an older release left them: a run that was begun again wrote behind what was there."""
    folder = RunFolder(tmp_path, SerialComm())
    folder.open()
    for number, step in enumerate([1, 2, 3, 4, 1, 2, 3, 4, 5, 3, 4]):
        folder.log_metrics({"step": step, "loss": float(number)})
    assert folder.keep_whole_rows(4)
    assert [(row["step"], row["loss"]) for row in read_metrics(folder.metrics)] == [
        (1, 4.0), (2, 5.0), (3, 9.0), (4, 10.0),
    ]  # fmt: skip


def test_a_resumed_run_reads_each_byte_of_a_checkpoint_once(tmp_path, monkeypatch):
    first = Run(tmp_path)
    sha256 = first.train(20)
    read, laid_out, opened, layout = [], [], store._opened, store.layout

    @contextlib.contextmanager
    def counted(path, size):
        with opened(path, size) as file:
            yield SimpleNamespace(seek=file.seek, read=lambda count: read.append(count) or file.read(count))

    monkeypatch.setattr(store, "_opened", counted)
    monkeypatch.setattr(store, "layout", lambda entries: laid_out.append(len(entries)) or layout(entries))
    monkeypatch.setattr(store, "crc32_of_part", lambda *part: pytest.fail("read once more"))
    again = Run(tmp_path)
    assert again.trainer.step == 20 and again.trainer.check_equal() == sha256
    tensors = read_manifest(store.path_of(first.folder.checkpoints, 20))["tensors"]
    (head,) = layout(tensors).values()
    assert sorted(read) == sorted([len(head.header), *(one["bytes"] for one in tensors)])
    assert laid_out == [len(tensors)]  # and what a file looks like is worked out once


@pytest.mark.parametrize("damage", ["bit", "end", "manifest", "file"])
def test_what_is_damaged_is_skipped(tmp_path, damage):
    """Also where weights are overwritten already when that is found."""
    first = Run(tmp_path)
    first.train(10)
    sha256 = first.trainer.check_equal()
    first.train(10)
    newest = store.path_of(first.folder.checkpoints, 20)
    shard = newest / "shard-0000.safetensors"
    if damage == "bit":
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
    elif damage == "end":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        (shard if damage == "file" else newest / "manifest.json").unlink()
    again = Run(tmp_path)
    assert again.trainer.step == 10 and again.trainer.check_equal() == sha256
    assert sum(line.startswith("skipping step-00000020: ") for line in again.said) == 1
    with pytest.raises(CheckpointError, match="step-00000020"):
        Run(tmp_path, resume=newest)
    shutil.rmtree(store.path_of(first.folder.checkpoints, 10))
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        Run(tmp_path)


def test_an_older_checkpoint_begins_another_way(tmp_path):
    first = Run(tmp_path)
    first.train(30)
    assert first.saved == [10, 20, 30]
    older = store.path_of(first.folder.checkpoints, 10)
    other = Run(tmp_path, resume=older, rate=0.02)
    assert other.trainer.step == 10 and other.saved == [10]
    left = sorted(path.name[:18] for path in first.folder.checkpoints.glob("left-*"))
    assert left == ["left-step-00000020", "left-step-00000030"]
    assert (first.folder.checkpoints / "latest").read_text() == "step-00000010\n"
    wanted = other.train(40, killed_at=25)
    # Killed, and begun again by `auto`: it goes on with the way that was taken last.
    again = Run(tmp_path, rate=0.02)
    assert again.trainer.step == 20 and again.steps == list(range(1, 21))
    again.train(25)
    assert again.trainer.check_equal() == wanted
    assert again.steps == list(range(1, 26))


def test_going_on_from_elsewhere_is_saved_at_once(tmp_path):
    """Else `auto` would begin anew, or go on with what was in the folder before."""
    source = Run(tmp_path / "a")
    source.train(10)
    Run(tmp_path / "b", rate=0.02).train(20)
    other = Run(tmp_path / "b", resume=tmp_path / "a")
    assert other.trainer.step == 10 and other.saved == []
    earlier = tmp_path / "b" / "earlier-1"
    assert (earlier / "checkpoints" / "step-00000020").is_dir()
    assert [row["step"] for row in read_metrics(earlier / "metrics.jsonl")] == list(range(1, 21))
    other.train(30, killed_at=13)
    assert other.saved == [10] and other.steps[0] == 11
    again = Run(tmp_path / "b")
    assert again.trainer.step == 10
    assert again.train(13) == other.trainer.check_equal()


@pytest.mark.parametrize(("validated", "best"), [(10, "step-00000010\n"), (8, None)])
def test_the_first_checkpoint_after_a_resume_is_the_best_only_if_its_weights_were_validated(
    tmp_path, validated, best
):
    """The loss comes back with its step, and is that of the weights that are saved again elsewhere."""
    source = Run(tmp_path / "a")
    source.trainer.state.val_loss, source.trainer.state.val_loss_step = 2.5, validated
    source.train(10)
    other = Run(tmp_path / "b", resume=tmp_path / "a")
    other.train(30, killed_at=13)
    assert other.saved == [10]
    names = other.folder.checkpoints / "best"
    assert (names.read_text() if names.exists() else None) == best
    state = Run(tmp_path / "b").trainer.state
    assert (state.step, state.val_loss, state.val_loss_step) == (10, 2.5, validated)


def test_a_restart_after_deaths(tmp_path):
    """In turn: nothing is saved yet; only what was resumed from; the newest checkpoint; which is damaged."""
    deaths = Deaths()
    deaths.begin([2], 0.0)
    first = Run(tmp_path / "a", deaths=deaths)
    assert first.said == ["rank 2 died: 1 rank restarts from step 0"] and first.trainer.step == 0
    first.train(10)
    deaths.begin([], 0.0)
    other = Run(tmp_path / "b", resume=tmp_path / "a", deaths=deaths)
    source = store.path_of(first.folder.checkpoints, 10)
    assert other.said == [
        f"an exchange failed although no rank died: 1 rank restarts from {tmp_path / 'a'}",
        f"resumed at step 10 from {source}",
    ]
    assert other.job.is_elsewhere  # nothing of it is in this folder
    first.train(10)
    again = Run(tmp_path / "a", deaths=deaths)
    assert again.said[0].endswith("1 rank restarts from the newest checkpoint") and again.trainer.step == 20
    (store.path_of(first.folder.checkpoints, 20) / "manifest.json").unlink()
    again = Run(tmp_path / "a", deaths=deaths)
    assert len(again.said) == 3 and again.said[1].startswith("skipping step-00000020: ")
    assert again.trainer.step == 10 and again.steps == list(range(1, 11))


def test_going_on_from_what_was_left(tmp_path):
    first = Run(tmp_path)
    first.train(20)
    folder = first.folder.checkpoints
    Run(tmp_path, resume=folder / "step-00000010", rate=0.02).train(20)
    (left,) = folder.glob("left-step-00000020-*")
    back = Run(tmp_path, resume=left)
    assert back.trainer.step == 20 and back.saved == [10]
    back.train(25, killed_at=22)
    assert back.saved == [10, 20]
    assert Run(tmp_path).trainer.step == 20


def test_resume_auto_leaves_all_where_it_is(tmp_path):
    Run(tmp_path).train(20)
    again = Run(tmp_path)
    assert again.saved == [10, 20] and again.steps == list(range(1, 21))
    assert not list(tmp_path.glob("left-*")) and not list(again.folder.checkpoints.glob("left-*"))


def test_a_checkpoint_with_facts_of_somebody_else(tmp_path):
    run = Run(tmp_path)
    run.train(10)
    path = store.path_of(run.folder.checkpoints, 10)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["crc32"]
    manifest["facts"]["config"] = "none"
    manifest["crc32"] = crc32_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="config is 'none', which cannot be"):
        Run(tmp_path)


# A folder that changes under a run --------------------------------------------------------------------


def test_a_folder_that_is_removed_under_a_run(tmp_path):
    run = Run(tmp_path / "run")
    run.train(10)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(LaunchError, match="is gone: somebody has removed or renamed it"):
        run.train(20)
    run.folder.failed(78, "it is gone")
    run.folder.say("more")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_emptied_or_renamed_under_a_run(tmp_path):
    run = Run(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(LaunchError, match="is gone"):
        run.folder.log_metrics({"step": 1})
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    run.folder.log_metrics({"step": 1})  # as if nothing had happened
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "in-use.json").unlink()
    with pytest.raises(LaunchError, match="is gone"):
        run.folder.log_metrics({"step": 2})
