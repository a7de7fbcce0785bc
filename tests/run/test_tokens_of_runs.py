"""Which tokens a run has: those that its checkpoint tells of, on every rank."""

import dataclasses
import shutil

import numpy as np
import pytest
from thread_comm import on_ranks

from tf_dist.checkpoint import store
from tf_dist.comm.runtime.consensus import everywhere
from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import DataError, LaunchError
from tf_dist.run.prepare_corpus import _on_all, corpus_of_run, other_corpus, shared_corpus

TEXTS = ["river boat", "boat and stone", "stone river and", "a light at night"]


class Case:
    """A corpus, and a run that was trained on it: with its folder, tokenizer and one checkpoint."""

    def __init__(self, folder, told, **options):
        self.folder, self.told = folder, told
        (folder / "text").mkdir()
        for number, text in enumerate(TEXTS):
            (folder / "text" / f"{number}.txt").write_text(text)
        given = {"tokenizer": "bpe", "val_fraction": 0.3, **options}
        self.config = Config(data=(str(folder / "text"),), prepared_dir=str(folder / "prepared"), **given)
        self.registry, self.run_dir = folder / "none.yaml", folder / "run"
        self.first = self.shared()
        # As a run's config.yaml has it: the size of the vocabulary is the tokenizer's.
        self.of_run = dataclasses.replace(self.config, vocab_size=self.first.tokenizer.vocab_size)
        self.run_dir.mkdir()
        self.first.tokenizer.save(self.run_dir / "tokenizer.json")
        self.content = self.first.meta["content_sha256"]
        facts = {
            "config": self.of_run.as_dict(),
            "content_sha256": self.content,
            "tokenizer_sha256": self.first.meta["tokenizer_sha256"],
        }
        store.save(self.run_dir / "checkpoints", 3, {"weights/0": np.zeros(2, np.float32)}, facts)

    def shared(self, config=None, run_dir=None):
        return shared_corpus(config or self.config, SerialComm(), self.registry, run_dir)

    def of(self, content="the run's"):
        wanted = self.content if content == "the run's" else content
        comm = SerialComm()
        return corpus_of_run(self.of_run, wanted, comm, self.registry, self.run_dir)

    @property
    def said(self):
        return self.told.messages

    def grow(self):
        for number in range(4, 12):
            (self.folder / "text" / f"{number}.txt").write_text("quartz jinx vex fjord " * 9)

    def folders(self):
        return sorted(path.name for path in (self.folder / "prepared").glob("text-*"))


@pytest.fixture
def case(tmp_path, told):
    return Case(tmp_path, told)


def test_the_tokens_of_a_run_are_found_and_not_made_again(case):
    made = case.folders()
    case.told.clear()
    assert case.of().path == case.first.path
    assert (case.folders(), case.said) == (made, [])


def test_a_corpus_that_has_changed_changes_nothing(case):
    made = case.folders()
    case.grow()
    case.told.clear()
    assert case.of().path == case.first.path
    assert case.folders() == made
    (line,) = case.said
    assert "the corpus has changed" in line and "the run's own tokens" in line
    shutil.rmtree(case.folder / "text")
    assert case.of().path == case.first.path
    assert "cannot be read any more" in case.said[-1]


def test_tokens_that_are_gone_are_made_again_by_the_runs_own_tokenizer(case):
    shutil.rmtree(case.folder / "prepared")
    again = case.of()
    assert again.meta["content_sha256"] == case.content
    shutil.rmtree(case.folder / "prepared")
    case.grow()
    with pytest.raises(DataError, match=r"tokens are not in .* its tokens are others now\. Put"):
        case.of()
    shutil.rmtree(case.folder / "text")
    with pytest.raises(DataError, match=r"tokens are not in .* no such file or folder: .* --data FILE"):
        case.of()


def test_weights_from_elsewhere_know_of_no_tokens(case):
    case.grow()
    made = case.of(None)
    assert made.meta["tokenizer_sha256"] == case.first.meta["tokenizer_sha256"]
    assert made.meta["content_sha256"] != case.content
    assert "the weights came from elsewhere" in case.said[-1]


def test_other_text_is_read_by_the_runs_tokenizer(case):
    (case.folder / "other.txt").write_text("a stone at night")
    config = dataclasses.replace(case.of_run, data=(str(case.folder / "other.txt"),))
    other = other_corpus(config, SerialComm(), case.registry, case.run_dir)
    assert other.tokenizer.decode(other.train) == "a stone at night"
    assert other.train.tolist() == case.first.tokenizer.encode("a stone at night").tolist()
    assert len(other.val) == 0


def test_a_resumed_run_goes_on_with_the_tokens_it_began_with(case):
    assert case.shared(run_dir=case.run_dir).path == case.first.path
    case.grow()
    made = case.folders()
    for config in (case.config, case.of_run):
        case.told.clear()
        assert case.shared(config, case.run_dir).path == case.first.path
        (line,) = case.said
        assert "since the run began: it continues with its own tokens" in line
    assert case.folders() == made


@pytest.mark.parametrize(
    "change", [{"resume": "never"}, {"val_fraction": 0.5}, {"vocab_size": 280}, {"seed": 2}]
)
def test_other_data_that_is_asked_for_is_other_data(case, change):
    case.grow()
    asked = dataclasses.replace(case.config, **change)
    assert case.shared(asked, case.run_dir).path != case.first.path


@pytest.mark.parametrize("resume", ["run", "run/checkpoints/step-00000003"])
def test_resumed_from_a_path(case, resume):
    case.grow()
    asked = dataclasses.replace(case.config, resume=str(case.folder / resume))
    assert case.shared(asked, case.folder / "another").path == case.first.path


def test_a_checkpoint_that_tells_nothing(case):
    case.grow()
    for facts in ({}, {"config": 5}, {"config": case.of_run.as_dict(), "content_sha256": 7}):
        shutil.rmtree(case.run_dir / "checkpoints")
        store.save(case.run_dir / "checkpoints", 3, {"weights/0": np.zeros(2, np.float32)}, facts)
        assert case.shared(run_dir=case.run_dir).path != case.first.path


def test_ranks_with_other_tokens_are_named_with_their_folders(case):
    case.grow()
    others = case.shared()
    outcomes = on_ranks(2, lambda comm: _on_all(Apart(comm), lambda: (case.first, others)[comm.rank]))
    for error in outcomes:
        assert isinstance(error, LaunchError)
        text = str(error)
        assert f"{case.first.path} on rank 0, {others.path} on rank 1" in text
        assert "train.bin: " in text and "content_sha256: " in text


class Apart:
    """Ranks of which each has a disk of its own: what rank 0 names is not found on the others."""

    def __init__(self, comm):
        self._comm = comm

    def __getattr__(self, name):
        return getattr(self._comm, name)

    def broadcast_obj(self, value):
        outcome = self._comm.broadcast_obj(value)
        return outcome if self._comm.rank == 0 else {"value": "nowhere"}


@pytest.mark.parametrize("failing", [[1], [0, 2], [0, 1, 2]])
def test_what_fails_anywhere_fails_everywhere(failing):
    def look(comm):
        if comm.rank in failing:
            raise DataError("this disk is bad")
        return comm.rank

    outcomes = on_ranks(3, lambda comm: everywhere(comm, lambda: look(comm)))
    assert all(isinstance(error, DataError) for error in outcomes)
    who = {1: "rank 1: ", 2: "ranks 0, 2: ", 3: ""}[len(failing)]
    assert {str(error) for error in outcomes} == {f"{who}this disk is bad"}
    assert on_ranks(3, lambda comm: everywhere(comm, lambda: comm.rank)) == [0, 1, 2]
