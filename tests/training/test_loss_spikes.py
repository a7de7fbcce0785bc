"""Losses that jump: when, where a run goes back to, what is passed over; and a resumed run does the same."""

import json
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import layers

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import NumericError, UsageError
from tf_dist.run.job import Job
from tf_dist.run.run_callbacks import LogRun, SaveRun
from tf_dist.run.run_folder import RunFolder
from tf_dist.training.loss_spikes import MOST_ROLLBACKS, WINDOW, LossSpikes, Spike
from tf_dist.training.train_state import TrainState
from tf_dist.training.trainer import Trainer

V, T, G = 11, 4, 8
TOKENS = np.random.default_rng(1).integers(0, V, 40_000).astype(np.uint16)


def fed(losses, **options):
    spikes = LossSpikes(**{"on_spike": "warn", **options})
    said = [spikes.look(step, loss) for step, loss in enumerate(losses, 1)]
    return spikes, [step for step, text in enumerate(said, 1) if text]


def test_a_jump_is_told_from_noise_and_from_learning():
    chance = np.random.default_rng(1)
    losses = 2.0 + 2.0 * np.exp(-np.arange(400) / 60) + chance.normal(0, 0.02, 400)
    losses[250] += 1.0
    assert fed(losses)[1] == [251]
    assert fed(losses, on_spike="off")[1] == []


def test_the_limit_is_by_median_and_spread():
    losses = [1.0, 3.0] * (WINDOW // 2)
    spikes, said = fed(losses, factor=2.0)
    assert said == [] and spikes.limit() == pytest.approx(2.0 + 2.0 * 1.4826)
    assert fed(losses[1:])[0].limit() == math.inf  # too few
    spikes, _ = fed([5.0] * WINDOW, factor=4.0)
    assert spikes.limit() == pytest.approx(5.2)  # not every flicker, where losses do not differ


def test_losses_that_are_none_are_left_to_others():
    spikes, said = fed([5.0] * WINDOW + [math.nan, math.inf])
    assert said == [] and spikes.limit() < 6


def go_back(spikes, spike, step, saved=None):
    """Be at a checkpoint of this step, which knows of these spikes."""
    first, state = spikes.batch_after(spike), TrainState(spikes=spikes.seen)
    state.load_state_dict({"step": step, "tokens": 0, "elapsed_s": 0.0, "spikes": saved or {}})
    return spikes.pass_over(spike, step, first)


def test_batches_that_are_passed_over():
    spikes = LossSpikes("rollback", skip=10)
    assert [spikes.seen.batch_of(step) for step in (0, 50)] == [0, 50]
    assert go_back(spikes, 46, 20) == 36  # 20 to 45, and ten more
    assert [spikes.seen.batch_of(step) for step in (19, 20, 21)] == [19, 56, 57]
    assert go_back(spikes, 31, 20) == 57  # again, from the same one: it goes on beyond
    assert [spikes.seen.batch_of(step) for step in (19, 20)] == [19, 77]
    later = {"skips": [[20, 57]], "losses": [1.0]}
    assert go_back(spikes, 90, 60, later) == 40
    assert spikes.seen.skips == [[20, 57], [60, 40]] and spikes.seen.batch_of(60) == 90 - 1 + 57 + 1 + 10
    assert list(spikes.seen.losses) == [1.0]


def test_not_for_ever():
    spikes = LossSpikes("rollback")
    for _ in range(MOST_ROLLBACKS):
        go_back(spikes, 100, 60)
    with pytest.raises(NumericError, match="it is not the data"):
        go_back(spikes, 100, 60)


@pytest.mark.parametrize("values", [{"on_spike": "roll"}, {"factor": 0.0}, {"skip": -1}])
def test_what_is_refused(values):
    with pytest.raises(UsageError):
        LossSpikes(**values)


# A run --------------------------------------------------------------------------------------------

POISON = 75  # the number of a batch


class Run:
    """A job on one rank, one of whose batches makes its loss jump."""

    def __init__(self, folder, on_spike="rollback"):
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((T,), dtype="int32"), layers.Embedding(V, 8)])
        model.add(layers.Dense(V))
        self.trainer = Trainer(
            model, keras.optimizers.Adam(0.01), SerialComm(), global_batch_size=G, micro_batch_size=G,
            clip_norm=0.0, seq_len=T, autotune="off", spikes=LossSpikes(on_spike, skip=5),
        )  # fmt: skip
        self.folder = RunFolder(folder, SerialComm())
        self.folder.open()
        corpus = SimpleNamespace(meta={"content_sha256": "of some text"})
        corpus.verify = corpus.check_unchanged = lambda: None
        self.job = Job(Config(), SerialComm(), corpus, self.folder, self.trainer)
        self.taken = []
        self.poison()

    def poison(self):
        sequences = self.trainer.sequences(TOKENS)
        sampler, gradients = self.trainer.sampler(sequences), self.trainer.replica.gradients
        bad, _ = sequences.rows(sampler.batch(POISON))

        def poisoned(x, y, draw):
            gradient, sums = gradients(x, y, draw)
            self.taken.append(draw[0])
            if np.array_equal(x, bad):
                return gradient * 5, sums * [5, 1, 1]
            return gradient, sums

        self.trainer.replica.gradients = poisoned

    def train(self, steps):
        trainer, job = self.trainer, self.job

        while True:
            calls = [
                LogRun(trainer, self.folder, 1, 100),
                SaveRun(trainer, 10, job.save, job.finish, job.poll, job.saved),
            ]
            try:
                trainer.fit(TOKENS, steps=steps, callbacks=calls)
                return trainer.check_equal()
            except Spike as spike:
                job.roll_back(spike)


def test_a_run_goes_back_and_passes_over_and_a_resumed_one_does_the_same(tmp_path, capsys):
    run = Run(tmp_path / "run")
    sha = run.train(100)
    assert "back to step 50, and 31 batches from there on are skipped" in capsys.readouterr().out
    assert run.taken == [*range(76), *range(50, 100)]
    assert run.trainer.state.spikes.skips == [[50, 31]]
    rows = [row["step"] for row in read(run)]
    assert rows == list(range(1, 101))
    assert run.folder._status["rollbacks"] == [{"spike": 76, "to": 50, "batches": 31}]
    names = {path.name[:18] for path in run.folder.checkpoints.iterdir()}
    assert {"left-step-00000060", "left-step-00000070", "step-00000100"} <= names
    # The data is passed over without a spike, too: what is in a checkpoint is enough.
    resumed = Run(tmp_path / "resumed", "off")
    older = run.folder.checkpoints / "step-00000080"
    resumed.job.config = Config(resume=str(older))
    resumed.job.resume()
    assert resumed.trainer.state.spikes.batch_of(80) == 111
    assert resumed.train(100) == sha


def read(run):
    return [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]


def test_a_run_that_is_stopped_before_the_spike_meets_it_alike(tmp_path):
    first = Run(tmp_path / "first")
    sha = first.train(100)
    second = Run(tmp_path / "second")
    second.train(70)
    third = Run(tmp_path / "second")
    third.job.resume()
    assert third.trainer.step == 70
    assert third.train(100) == sha
    assert third.trainer.state.spikes.skips == [[50, 31]]


def test_without_an_older_checkpoint_it_goes_on(tmp_path, capsys):
    run = Run(tmp_path / "run")
    run.job.save = lambda prune=True: None
    run.train(80)
    assert "no checkpoint is 20 steps older, so training continues" in capsys.readouterr().out
    assert run.taken == list(range(80)) and run.trainer.state.spikes.skips == []


def test_a_warning(tmp_path, capsys):
    run = Run(tmp_path / "run", "warn")
    run.train(80)
    assert capsys.readouterr().out.count("step 76: the loss has jumped to ") == 1
    assert run.taken == list(range(80))


def test_a_spike_has_the_exit_code_of_numbers():
    assert Spike(3, "jumped").exit_code == 76
