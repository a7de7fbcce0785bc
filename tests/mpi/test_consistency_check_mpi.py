"""The consistency check, the probe and debug mode on real ranks: all name what is injected into one."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tf_dist import faults
from tf_dist.comm.runtime.backend_self_test import prove
from tf_dist.comm.transport.mpi import MPIComm
from tf_dist.config import Config
from tf_dist.errors import LaunchError, OrderError

# Two have no majority, and are named both: `test_of_two_that_differ_neither_is_right`.
pytestmark = pytest.mark.ranks(3)

V, T = 13, 4
TOKENS = np.random.default_rng(1).integers(0, V, 600).astype(np.uint16)
STEPS = 6


@pytest.fixture(scope="module")
def ranks(connected):
    return connected


def trainer(comm, update="allreduce", on_mismatch="stop", every=1):
    import keras

    from tf_dist.training.trainer import Trainer

    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((T,), dtype="int32"), keras.layers.Embedding(V, 8, name="table")])
    model.add(keras.layers.Dense(V, name="logits"))
    return Trainer(
        model, keras.optimizers.Adam(1e-2), comm, update,
        clip_norm=0.0, global_batch_size=8, seq_len=T, check_every=every, on_mismatch=on_mismatch,
    )  # fmt: skip


def train(trained, inject=None):
    """Take steps, with an accident on the last rank after the fourth; what was raised, or nothing."""
    sequences = trained.sequences(TOKENS)
    sampler = trained.sampler(sequences)
    try:
        for step in range(STEPS):
            if inject and step == 4 and trained.comm.rank == trained.comm.size - 1:
                inject(trained)
            trained.train_step(sequences, sampler)
    except LaunchError as error:
        return str(error)
    return None


def flip(variable):
    array = np.array(np.asarray(variable.value))
    array.reshape(-1).view(np.uint8)[5] ^= 1
    variable.assign(array)


def unsynchronised(trained):
    bias = trained.model.get_layer("logits").bias
    bias.assign(bias + 0.5)


def moment(trained):
    return next(v for v in trained.optimizer.variables if v.path.endswith("embeddings_velocity"))


INJECTED = {
    "one unsynchronised weight": (unsynchronised, "logits/bias"),
    "one bit of a weight": (lambda trained: flip(trained.model.weights[0]), "table/embeddings"),
    "one bit of a moment": (lambda trained: flip(moment(trained)), "embeddings_velocity"),
}


def state(trained):
    variables = [variable for _, variable in trained.consistency_check.groups[0].variables]
    return b"".join(np.asarray(variable.value).tobytes() for variable in variables)


BY_MASTER = {"one unsynchronised weight": [pytest.mark.extended]}
injected = pytest.mark.parametrize(
    ("update", "name"),
    [
        *(("allreduce", name) for name in INJECTED),
        *(pytest.param("master", name, marks=BY_MASTER.get(name, ())) for name in INJECTED),
    ],
)


@injected
def test_what_differs_is_named(ranks, everyone, update, name):
    inject, variable = INJECTED[name]
    trained = trainer(ranks, update)
    said = train(trained, inject)
    R = ranks.size
    assert everyone(said) == [said] * R
    if R == 1 or (update == "master" and "moment" in name):
        # A worker's moments are never used; those of rank 0 have nothing to be compared with.
        assert said is None
        return
    who = "rank 0 and rank 1 differ" if R == 2 else f"rank {R - 1} differs from ranks 0, 1"
    assert who in said
    assert f"before step 5 the ranks no longer hold the same model: {who}" in said
    assert said.split(" in ")[1].split(". ")[0].endswith(variable)
    assert trained.step == 4


@pytest.mark.ranks(2)
def test_of_two_that_differ_neither_is_right(ranks, everyone):
    said = train(trainer(ranks, on_mismatch="restore"), INJECTED["one bit of a weight"][0])
    assert everyone(said) == [said] * ranks.size
    if ranks.size == 2:
        assert "before step 5 the ranks no longer hold the same model: rank 0 and rank 1 differ in" in said
        assert "Nothing was restored: no majority" in said


@injected
def test_a_restored_run_has_the_bits_of_an_undisturbed_one(ranks, everyone, told, update, name):
    undisturbed, disturbed = trainer(ranks, update), trainer(ranks, update, "restore")
    assert train(undisturbed) is None
    assert not told.messages
    said, lines = train(disturbed, INJECTED[name][0]), told.messages
    R = ranks.size
    assert everyone(said) == [said] * R
    if R == 2 and not (update == "master" and "moment" in name):
        assert "Nothing was restored: no majority" in said
        return
    if R > 2 and not (update == "master" and "moment" in name):
        assert len(lines) == 1
        assert f"rank {R - 1} differs" in lines[0]
    if R > 1:
        assert everyone(state(disturbed)) == [state(undisturbed)] * R
        disturbed.check_equal()


@pytest.mark.parametrize(
    ("update", "every", "phase"),
    [("allreduce", 3, "forward"), ("allreduce", 3, "update"), ("master", 1, "step"), ("zero", 1, "step")],
)
def test_steps_since_a_flipped_bit_are_taken_again(ranks, everyone, told, update, every, phase):
    """The bit has spoiled the gradients of all, and in the end nobody can tell that it was there."""
    undisturbed = trainer(ranks, update, every=every)
    assert train(undisturbed) is None
    victim, R = ranks.size - 1, ranks.size
    disturbed = trainer(ranks, update, "restore", every)
    faults.arm(f"bitflip:rank={victim},step=5,phase={phase},seed=4", ranks.rank)
    told.clear()
    said = train(disturbed)
    faults.arm("", 0)
    lines = told.messages
    assert everyone((said, lines)) == [(said, lines)] * R
    if R == 1:
        assert (said, lines) == (None, [])
        return
    if R == 2:
        assert "Nothing was restored: no majority" in (said or "") or every == 3
        return
    if every == 3:
        disturbed.consistency_check.compare(STEPS)
    (line,) = told.messages
    assert f"rank {victim} differs from ranks 0, 1" in line
    assert line.endswith("steps 4 to 6 were taken again" if every == 3 else "step 4 was taken again")
    assert everyone(state(disturbed)) == [state(undisturbed)] * R
    assert (disturbed.step, disturbed.tokens) == (undisturbed.step, undisturbed.tokens)


class Corpus:
    """What a job needs of its corpus to save a checkpoint."""

    meta: ClassVar = {"content_sha256": "of some text"}

    def check_unchanged(self):
        pass


@pytest.mark.parametrize("on_mismatch", ["stop", "restore"])
def test_no_checkpoint_holds_what_ranks_do_not_share(ranks, everyone, tmp_path, on_mismatch):
    """A weight changes between two checks: the ranks are compared before a byte is written."""
    from tf_dist.checkpoint import store
    from tf_dist.run import run_lock
    from tf_dist.run.job import Job
    from tf_dist.run.run_folder import RunFolder

    trained = trainer(ranks, on_mismatch=on_mismatch)
    assert train(trained) is None
    run = RunFolder(Path(everyone(str(tmp_path))[0]), ranks)
    if ranks.rank == 0:
        run.checkpoints.mkdir()
        run_lock.claim(run.path)
    job = Job(Config(), ranks, Corpus(), run, trained)
    right = state(trained)
    if ranks.rank == 0:  # the one that writes
        flip(trained.model.weights[0])
    try:
        job.finish()
        said = None
    except LaunchError as error:
        said = str(error)
    saved = [path.name for path in store.listing(run.checkpoints)]
    assert everyone((said, saved)) == [(said, saved)] * ranks.size
    if ranks.size == 1:
        assert (said, saved) == (None, [f"step-{STEPS:08d}"])
    elif on_mismatch == "stop" or ranks.size == 2:
        assert saved == []
        assert "rank 0" in said and "table/embeddings" in said
        assert not (run.path / "status.json").exists()
    else:
        assert (said, saved) == (None, [f"step-{STEPS:08d}"])
        tensors, _, _ = store.load(run.checkpoints / saved[0])
        assert b"".join(tensor.tobytes() for tensor in tensors.values()) == right


def test_another_number_of_collectives_is_said_by_all(ranks, everyone):
    """By the trainer's own consistency check; collectives that are really left out are in tests/jobs."""
    trained = trainer(ranks)
    last = ranks.size - 1

    def one_more(trained):
        ranks.calls += 1

    try:
        said = train(trained, one_more)
    finally:
        ranks.calls -= ranks.rank == last
    assert everyone(said) == [said] * ranks.size
    if ranks.size > 1:
        assert "before step 5 the ranks have called different numbers of collectives" in said
        assert f" on rank {last}" in said
        assert trained.step == 4


@pytest.mark.ranks(2)
def test_the_probe(comm, everyone):
    assert everyone(prove(comm)) == [None] * len(everyone(None))


class NoReduction(MPIComm):
    def _allreduce(self, array):
        pass


def test_a_backend_that_does_not_reduce_trains_nothing(ranks, everyone):
    trained = trainer(NoReduction())
    try:
        trained.fit(TOKENS, steps=2)
        said = None
    except LaunchError as error:
        said = str(error)
    assert everyone((said, trained.step)) == [(said, trained.step)] * ranks.size
    if ranks.size > 1:
        assert "allreduce of float32 returned 1, not" in said
        assert trained.step == 0


# Debug mode ---------------------------------------------------------------------------------------


@pytest.mark.ranks(2)
def test_in_debug_mode_a_training_is_the_same(ordered, ranks, everyone):
    plain, watched = trainer(ranks), trainer(ordered)
    assert train(plain) is None
    assert train(watched) is None
    watched.check_equal()
    assert everyone(
        bool(np.allclose(plain.model.get_weights()[0], watched.model.get_weights()[0], atol=1e-5))
    )


def test_in_debug_mode_other_types_are_refused_and_the_ranks_still_talk(ordered, everyone):
    last = ordered.rank == ordered.size - 1
    try:
        ordered.allreduce(np.ones(7, np.float64 if last else np.float32))
        said = None
    except OrderError as error:
        said = str(error)
    assert everyone(said) == [said] * ordered.size
    if ordered.size > 1:
        assert "7 float32" in said
        assert "7 float64" in said
        assert said.count("mpi/test_consistency_check_mpi.py:") >= 2
    assert ordered.allgather_obj(ordered.rank) == list(range(ordered.size))


def test_swapped_collectives_of_one_form_are_told_by_their_lines(ordered, everyone):
    array = np.ones(3)
    try:
        if ordered.rank == 0:
            ordered.allreduce(array)
        else:
            ordered.allreduce(array)
        said = None
    except OrderError as error:
        said = str(error)
    assert everyone(said) == [said] * ordered.size
    assert ordered.size == 1 or "they differ in the line alone" in said
