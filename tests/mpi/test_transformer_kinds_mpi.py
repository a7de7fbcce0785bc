"""Llama, Qwen and their like on every grid, against one rank.

The kind has all that differs from GPT-2: rope, grouped queries, norms of heads, a gate, a window.
"""

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.ranks(2, 4)

N = MPI.COMM_WORLD.size
V, T, G, B, STEPS = 30, 12, 8, 2, 3
SIZES = {"vocab_size": V, "seq_len": T, "layers": 2, "width": 16, "heads": 4, "seed": 7}
QWEN = {
    "normalization": "rmsnorm", "activation": "swiglu", "position_embedding": "rope", "bias": "none",
    "kv_heads": 2, "head_width": 8, "qk_norm": True, "sliding_window": 5, "tie_embeddings": False,
}  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, V, 700).astype(np.uint16)
HELD_OUT = np.random.default_rng(2).integers(0, V, 100).astype(np.uint16)


def trained(comm, pipeline=1, sequence=1, tensor=1, **more):
    """A few steps: the hash, losses with the validation's, and all tensors on rank 0."""
    from tf_dist.optim import optimizers
    from tf_dist.training.model import model_for
    from tf_dist.training.trainer import Trainer

    mesh = Mesh(comm, pipeline, sequence, tensor)
    degrees = {"pipeline_parallel": pipeline, "sequence_parallel": sequence, "tensor_parallel": tensor}
    config = Config(**SIZES, **QWEN, **degrees, learning_rate=1e-2, **more)
    model = model_for(config, mesh)
    trainer = Trainer(
        model, optimizers.build(config, model, 20), comm, config.chosen_strategy(),
        global_batch_size=G, micro_batch_size=B, seq_len=T, clip_norm=0.5, seed=3, mesh=mesh, autotune="off",
    )  # fmt: skip
    losses = [step["loss"] for step in steps_of(trainer)] + [trainer.validate(HELD_OUT)["val_loss"]]
    arrays = [np.array(array) for _, array in trainer.whole().tensors()]
    return trainer.check_equal(), losses, arrays


def steps_of(trainer):
    sequences = trainer.sequences(TOKENS)
    sampler = trainer.sampler(sequences)
    return [trainer.train_step(sequences, sampler) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def serial(connected):
    return MPI.COMM_WORLD.bcast(trained(SerialComm()) if connected.rank == 0 else None)


ALIKE = [{"strategy": "zero", "zero_stage": 2}] if N == 2 else []


@pytest.mark.parametrize("options", ALIKE, ids=str)
def test_data_parallel_ranks_have_the_bits_of_one(connected, serial, options):
    sha256, losses, _ = trained(connected, **options)
    assert (sha256, losses) == serial[:2]


GRIDS = {
    2: [
        {"tensor": 2},
        {"sequence": 2},
        pytest.param({"pipeline": 2}, marks=pytest.mark.extended),
        pytest.param({"strategy": "zero", "zero_stage": 3}, marks=pytest.mark.extended),
    ],
    4: [{"tensor": 2, "pipeline": 2}, {"sequence": 2, "tensor": 2}],
}


@pytest.mark.parametrize("options", GRIDS.get(N, []), ids=str)
def test_a_grid_is_one_rank_within_rounding(connected, serial, options):
    _, losses, arrays = trained(connected, **options)
    assert losses == pytest.approx(serial[1], abs=1e-5)
    if connected.rank == 0:
        for mine, theirs in zip(arrays, serial[2], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)
