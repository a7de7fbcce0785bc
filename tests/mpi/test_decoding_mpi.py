"""Text that ranks of a grid write together, with caches on each, against one rank and against no cache.

Legend: T tokens, V vocabulary.
"""

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.ranks(2, 4)

N = MPI.COMM_WORLD.size
V, T = 30, 16
SIZES = {"vocab_size": V, "seq_len": T, "layers": 4, "width": 24, "heads": 12, "seed": 7}
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [10, 11], list(range(T + 4))]


def made(comm, model="transformer", pipeline=1, tensor=1, sequence=1, strategy="allreduce", stage=1, **more):
    """A trainer whose weights make everything matter: 8 times those it begins with."""
    from tf_dist.optim import optimizers
    from tf_dist.training.model import model_for
    from tf_dist.training.trainer import Trainer

    mesh = Mesh(comm, pipeline, sequence, tensor)
    degrees = {"pipeline_parallel": pipeline, "tensor_parallel": tensor, "sequence_parallel": sequence}
    config = Config(**SIZES, model=model, **degrees, strategy=strategy, zero_stage=stage, **more)
    built = model_for(config, mesh)
    trainer = Trainer(
        built, optimizers.build(config, built, 20), comm,
        global_batch_size=8, micro_batch_size=2, seq_len=T, seed=3, mesh=mesh, update=strategy,
        zero_stage=stage, pipeline=more or None,
    )  # fmt: skip
    held = trainer.replica.variables
    if stage == 3:  # there are only this rank's parts
        held = [one.variable for one in trainer.replica.optimizer_step.stretches]
    for variable in held:
        variable.assign(variable * 8.0)
    return trainer


def texts(trainer, comm=None):
    """What greedy, sampling and beam search make of the prompts, also beyond the window."""
    from tf_dist.decoding.beam_search import BeamSearch
    from tf_dist.decoding.decode import decode
    from tf_dist.decoding.sampling import GREEDY, Sampling
    from tf_dist.runners.decoding_forward import forward_of

    forward = forward_of(trainer.runner, T, lockstep=trainer.strategy.traits.sharding == 3)
    found = []
    for strategy, count in [(GREEDY, T + 2), (Sampling(1.0, seed=5), 6), (BeamSearch(2), 6)]:
        made = decode(forward, PROMPTS, strategy, count, end=0, batch=len(PROMPTS), comm=comm)
        found += [(list(one.ids), one.ended, one.log_probability) for one in made]
    return found, forward


def check(found, expected):
    """The same tokens, and log probabilities within rounding."""
    assert [one[:2] for one in found] == [one[:2] for one in expected]
    np.testing.assert_allclose([one[2] for one in found], [one[2] for one in expected], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def serial(connected):
    """The texts of one rank, by model; made by rank 0 for all."""
    known = {}

    def of(model):
        if model not in known:
            known[model] = None
            if connected.rank == 0:
                known[model] = texts(made(SerialComm(), model))[0]
            known[model] = MPI.COMM_WORLD.bcast(known[model])
        return known[model]

    return of


CASES = {
    "tensor": {"tensor": N},
    "tensor, lstm": {"tensor": N, "model": "lstm"},
    "pipeline": {"pipeline": N},
    "pipeline, two stages each": {"pipeline": 2, "pipeline_schedule": "interleaved", "virtual_stages": 2},
    "pipeline, lstm": {"pipeline": N, "model": "lstm"},
    "weights that come and go": {"strategy": "zero", "stage": 3},
    "gradients that leave": {"strategy": "zero", "stage": 2},
    "data": {},
}
if N == 4:
    CASES = {"both": {"tensor": 2, "pipeline": 2}, "tensor and data": {"tensor": 2, "model": "lstm"}}


# What other cases show: an LSTM on one axis, and ranks that hold the model whole, as in ZeRO 3.
REPEATED = ("tensor, lstm", "gradients that leave", "data", "pipeline")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.extended] * (case in REPEATED)) for case in CASES]
)
def test_ranks_write_what_one_rank_writes(connected, everyone, serial, case):
    from tf_dist.decoding.forward import WindowForward

    grid = CASES[case]
    trainer = made(connected, **grid)
    found, forward = texts(trainer, trainer.mesh.data)
    assert not isinstance(forward, WindowForward)
    assert everyone(found) == [found] * N
    check(found, serial(grid.get("model", "transformer")))


def test_ranks_that_share_rows_keep_no_cache_and_say_so(connected, everyone, serial, caplog):
    import logging

    from tf_dist.decoding.forward import WindowForward

    log = logging.getLogger("tf_dist")
    log.addHandler(caplog.handler)
    trainer = made(connected, sequence=N)
    found, forward = texts(trainer, trainer.mesh.data)
    log.removeHandler(caplog.handler)
    assert isinstance(forward, WindowForward)
    assert caplog.text.count("without a cache, each token from its whole window: ranks share") == 1
    assert everyone(found) == [found] * N
    check(found, serial("transformer"))
