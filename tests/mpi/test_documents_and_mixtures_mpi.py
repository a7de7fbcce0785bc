"""Packed documents of a mixture of corpora: on two ranks as on one, on every grid, and after a resume.

Keras is imported inside functions: ``connected`` comes first, as in a user's script.
"""

import dataclasses
import time

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.data.mixture import MixtureRows

pytestmark = pytest.mark.ranks(2)

V, T, END = 23, 10, 5
STEPS, HALF = 4, 2
CONFIG = Config(
    vocab_size=V, seq_len=T, layers=2, width=16, heads=2, dropout=0.1, documents="packed", end_of_text=END,
    global_batch_size=6, micro_batch_size=2, seed=3, autotune="off", threads_per_rank=1, warmup_steps=0,
    steps=STEPS, tokenizer="byte",
)  # fmt: skip


def tokens(seed, count):
    """Documents of a few tokens each."""
    made = np.random.default_rng(seed).integers(0, V, count).astype(np.uint16)
    made[::7] = END
    return made


def mixture(seed):
    # So small that the second one is read again while the first one is not.
    parts = [tokens(seed, 400), tokens(seed + 1, 60)]
    return MixtureRows(np.concatenate(parts), T, [("large", 0.6, 400), ("small", 0.4, 60)])


def trained(comm, folder=None, stop=STEPS, start=False, **options):
    """Steps of a small model; its hash, its logs and its weights."""
    from tf_dist.cli.train import trainer_for
    from tf_dist.parallel.mesh import Mesh
    from tf_dist.tasks.registry import task_of
    from tf_dist.training import state_dict

    config = dataclasses.replace(CONFIG, **options)
    mesh = Mesh(comm, *config.degrees)
    trainer, task = trainer_for(config, mesh, STEPS), task_of(config)
    layout = task.layout(V)
    rows, held_out = (task.rows(mixture(seed), layout, config.seed) for seed in (1, 7))
    if start:
        state_dict.restore(trainer, folder / f"step-{HALF:08d}")
    logs = trainer.fit(rows, steps=stop, validation=held_out, eval_every=STEPS)
    if folder is not None and not start:
        state_dict.save(trainer, folder, stop, {})
    arrays = [np.array(array) for _, array in trainer.whole().tensors()]
    return trainer.check_equal(), logs, arrays


def from_rank_0(make):
    """What rank 0 alone makes. The other sleeps: ranks may be more than cores."""
    made = make() if MPI.COMM_WORLD.rank == 0 else None
    request = MPI.COMM_WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.005)
    return MPI.COMM_WORLD.bcast(made)


@pytest.fixture(scope="module")
def serial(connected):
    """On one rank."""
    return from_rank_0(lambda: trained(SerialComm()))


def test_two_ranks_are_one(connected, serial):
    sha256, logs, _ = trained(connected)
    assert sha256 == serial[0]
    assert logs == serial[1]


def test_validation_is_by_corpus(connected, serial):
    logs = {name: values[-1] for name, values in serial[1].items()}
    wanted = 0.6 * logs["val_loss_large"] + 0.4 * logs["val_loss_small"]
    assert logs["val_loss"] == pytest.approx(wanted, rel=1e-12)
    assert logs["val_loss_large"] != logs["val_loss_small"]
    assert logs["perplexity"] == pytest.approx(np.exp(wanted))


def test_what_packing_changes_is_seen(connected, serial):
    windows = from_rank_0(lambda: trained(SerialComm(), documents="windows"))
    assert windows[0] != serial[0]


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=pytest.mark.extended) for stage in (1, 2)])
def test_zero_is_allreduce(connected, serial, stage):
    sha256, logs, _ = trained(connected, strategy="zero", zero_stage=stage)
    assert sha256 == serial[0] and logs == serial[1]


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "zero", "zero_stage": 3},
        {"tensor_parallel": 2},
        {"pipeline_parallel": 2},
        pytest.param(
            {"pipeline_parallel": 2, "pipeline_schedule": "zero-bubble"}, marks=pytest.mark.extended
        ),
    ],
    ids=str,
)
def test_ranks_that_share_a_model(connected, serial, options):
    _, logs, arrays = trained(connected, **options)
    for name in ("loss", "val_loss", "val_loss_small"):
        np.testing.assert_allclose(logs[name], serial[1][name], rtol=1e-5)
    if connected.rank == 0:
        for mine, theirs in zip(arrays, serial[2], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


def test_after_a_resume_on_the_other_number_of_ranks(connected, serial, tmp_path):
    folder = MPI.COMM_WORLD.bcast(tmp_path)
    trained(connected, folder, stop=HALF)
    found = from_rank_0(lambda: trained(SerialComm(), folder, start=True))
    assert found[0] == serial[0]


def test_masked_language_models(connected):
    options = {"task": "masked-lm"}
    alone = from_rank_0(lambda: trained(SerialComm(), **options))
    assert trained(connected, **options)[:2] == alone[:2]


@pytest.mark.extended
def test_masked_language_models_in_a_pipeline(connected):
    options = {"task": "masked-lm"}
    alone = from_rank_0(lambda: trained(SerialComm(), **options))
    logs = trained(connected, pipeline_parallel=2, **options)[1]
    np.testing.assert_allclose(logs["val_loss"], alone[1]["val_loss"], rtol=1e-5)
