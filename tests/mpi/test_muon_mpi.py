"""Muon on ranks, replicated, and with ZeRO divided, each matrix its owner's: the bits of one rank."""

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.ranks(2, 3)

N = MPI.COMM_WORLD.size
# Three ranks cut other matrices.
REPEATED = ("replicated", "zero 2") if N == 2 else ("replicated", "zero 2", "zero 3")
V, T, G, B, STEPS = 30, 8, 8, 2, 3
SIZES = {"vocab_size": V, "seq_len": T, "layers": 2, "width": 40, "heads": 4, "seed": 7}
TOKENS = np.random.default_rng(1).integers(0, V, 700).astype(np.uint16)


def trained(comm, steps=STEPS, folder=None, pipeline=1, **more):
    from tf_dist.optim import optimizers
    from tf_dist.training import state_dict
    from tf_dist.training.model import model_for
    from tf_dist.training.trainer import Trainer

    mesh = Mesh(comm, pipeline)
    config = Config(
        **SIZES, optimizer="muon", learning_rate=1e-2, warmup_steps=0, pipeline_parallel=pipeline, **more
    )
    model = model_for(config, mesh)
    trainer = Trainer(
        model, optimizers.build(config, model, 20), comm, config.chosen_strategy(),
        global_batch_size=G, micro_batch_size=B, seq_len=T, clip_norm=0.5, seed=3, mesh=mesh, autotune="off",
    )  # fmt: skip
    if folder is not None:
        state_dict.restore(trainer, folder)
    sequences = trainer.sequences(TOKENS)
    sampler = trainer.sampler(sequences)
    for _ in range(steps - trainer.step):
        trainer.train_step(sequences, sampler)
    return trainer


@pytest.fixture(scope="module")
def serial(connected):
    made = None
    if connected.rank == 0:
        trainer = trained(SerialComm())
        made = trainer.check_equal(), [np.array(array) for _, array in trainer.whole().tensors()]
    return MPI.COMM_WORLD.bcast(made)


WAYS = {
    "replicated": {},
    "zero 1": {"strategy": "zero", "zero_stage": 1},
    "zero 2": {"strategy": "zero", "zero_stage": 2},
    "zero 3": {"strategy": "zero", "zero_stage": 3},
}


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.extended] * (way in REPEATED)) for way in WAYS]
)
def test_the_bits_are_those_of_one_rank(connected, serial, way):
    trainer = trained(connected, **WAYS[way])
    assert trainer.check_equal() == serial[0]
    arrays = [np.array(array) for _, array in trainer.whole().tensors()]
    if connected.rank == 0:  # the optimizer's state as well
        assert len(arrays) == len(serial[1])
        for mine, theirs in zip(arrays, serial[1], strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.ranks(2)
def test_some_matrices_are_cut_and_a_run_goes_on_elsewhere(connected, serial, one_folder):
    from tf_dist.training import state_dict

    first = trained(connected, steps=2, strategy="zero", zero_stage=1)
    step = first.replica.optimizer_step._step
    assert step._cut and set(step._directions) - set(step._cut)
    state_dict.save(first, one_folder, 1, {})
    second = trained(connected, folder=one_folder / "step-00000002")
    assert second.check_equal() == serial[0]


@pytest.mark.ranks(2)
def test_a_pipeline_is_one_rank_within_rounding(connected, serial):
    trainer = trained(connected, pipeline=2)
    arrays = [np.array(array) for _, array in trainer.whole().tensors()]
    if connected.rank == 0:
        for mine, theirs in zip(arrays, serial[1], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-3)


def test_divided_matrices_are_refused(connected):
    with pytest.raises(UsageError, match="muon orthonormalises whole matrices, and tensor_parallel 2"):
        Config(**SIZES, optimizer="muon", tensor_parallel=2)
