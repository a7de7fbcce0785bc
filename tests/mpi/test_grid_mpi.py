"""Every grid of these ranks against one rank: training, validation, logits, checkpoints, consistency.

The model is small: 4 layers and 12 heads, which 2, 3 and 4 ranks can share.
"""

import re

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import LaunchError
from tf_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.ranks(4)  # two ranks have one axis, which has files of its own

V, T, G, B = 30, 12, 8, 2
SIZES = {"vocab_size": V, "seq_len": T, "layers": 4, "width": 24, "heads": 12, "seed": 7}
STEPS = 4
TOKENS = np.random.default_rng(1).integers(0, V, 700).astype(np.uint16)
HELD_OUT = np.random.default_rng(2).integers(0, V, 100).astype(np.uint16)
ROW = np.arange(T, dtype=np.int32)[None] % V
N = MPI.COMM_WORLD.size


def grids():
    """Pipeline x tensor, where both divide the ranks: data parallelism takes the rest."""
    return [(p, t) for p in range(1, N + 1) for t in range(1, N + 1) if N % (p * t) == 0]


def trainer(comm, pipeline=1, tensor=1, sequence=1, model="transformer", **more):
    from tf_dist.optim import optimizers
    from tf_dist.training.model import model_for
    from tf_dist.training.trainer import Trainer

    mesh = Mesh(comm, pipeline, sequence, tensor)
    degrees = {"pipeline_parallel": pipeline, "tensor_parallel": tensor, "sequence_parallel": sequence}
    update, stage = more.get("update", "allreduce"), more.get("zero_stage", 1)
    config = Config(**SIZES, model=model, **degrees, strategy=update, zero_stage=stage, learning_rate=1e-2)
    built = model_for(config, mesh)
    return Trainer(
        built, optimizers.build(config, built, 20), comm,
        global_batch_size=G, micro_batch_size=B, seq_len=T, clip_norm=0.5, seed=3, mesh=mesh, **more,
    )  # fmt: skip


def steps_of(trained, count=STEPS):
    sequences = trained.sequences(TOKENS)
    sampler = trained.sampler(sequences)
    return [trained.train_step(sequences, sampler) for _ in range(count)]


def tensors(trained):
    """All tensors by name; whole on rank 0. Keras numbers the optimizers of a process."""
    made = trained.whole().tensors()
    return {re.sub(r"adam_w(_\d+)?", "adam_w", name): np.array(array) for name, array in made}


def cases():
    """Model, pipeline, tensor and update: every grid once, the LSTM where both axes are used, or each."""
    both = [(p, t) for p, t in grids() if p * t == min(N, 4) and max(p, t) <= 2]
    if N % 2:  # one axis at most, which has a file of its own
        return []
    if N == 2:  # the files of each axis have more
        return [("transformer", 2, 1, "allreduce"), ("lstm", 1, 2, "zero")]
    # Axes that are used alone by four ranks are in files of their own.
    wanted = [(p, t) for p, t in grids() if N < 4 or ((p > 1 or t > 1) and max(p, t) == 2)]
    found = [("transformer", p, t, "zero" if p * t < N else "allreduce") for p, t in wanted]
    return found + [("lstm", p, t, "zero") for p, t in both]


@pytest.fixture(scope="module")
def serial(connected):
    """The training on one rank, by model: made by rank 0 for all."""
    known = {}

    def of(model):
        if model not in known:
            if connected.rank == 0:
                alone = trainer(SerialComm(), model=model)
                logs = steps_of(alone)
                known[model] = logs, alone.validate(HELD_OUT), alone.runner.logits(ROW), tensors(alone)
            known[model] = MPI.COMM_WORLD.bcast(known.get(model))
        return known[model]

    return of


def near(found, expected, tolerance):
    for name in expected:
        assert found[name] == pytest.approx(expected[name], abs=tolerance), name


@pytest.mark.parametrize(("model", "pipeline", "tensor", "update"), cases())
def test_a_grid_is_one_rank(connected, everyone, serial, model, pipeline, tensor, update):
    logs_alone, result_alone, logits_alone, tensors_alone = serial(model)
    trained = trainer(connected, pipeline, tensor, model=model, update=update)
    logs = steps_of(trained)
    assert everyone(logs) == [everyone(logs)[0]] * N
    for mine, theirs in zip(logs, logs_alone, strict=True):
        near(mine, theirs, 1e-5)
    near(trained.validate(HELD_OUT), result_alone, 1e-5)
    logits = trained.runner.logits(ROW)
    worst = max(everyone(float(np.abs(logits - logits_alone).max())))
    assert worst < 1e-3
    found = tensors(trained)
    if connected.rank == 0:
        assert list(found) == list(tensors_alone)
        shapes = [(array.shape, array.dtype) for array in found.values()]
        assert shapes == [(array.shape, array.dtype) for array in tensors_alone.values()]
    same = [np.array_equal(found[name], tensors_alone[name]) for name in found] if connected.rank == 0 else []
    # Ranks that have whole layers compute what one rank computes, but for the sum of a tied embedding.
    if (pipeline, tensor) == (1, 1):
        assert all(same)
    trained.check_equal()


# Saved on the first of each, and gone on with on the others and on one rank alone.
RESUMED = {
    1: [[(1, 1)]],
    2: [[(2, 1), (1, 1)], [(1, 2), (2, 1)]],
    3: [[(3, 1), (1, 1)]],
    4: [[(2, 1), (1, 1), (2, 2)]],
}


# Resumes on other grids are in tests/jobs/test_grids.py as well.
@pytest.mark.extended
@pytest.mark.parametrize("chain", RESUMED[N] if N in RESUMED else [])
def test_a_checkpoint_knows_no_grid(connected, one_folder, chain):
    """Saved on a grid, gone on with on one rank, on data ranks alone, and on the other grids."""
    from tf_dist.training import state_dict

    saved = trainer(connected, *chain[0], update="zero")
    steps_of(saved, 2)
    before = tensors(saved)
    state_dict.save(saved, one_folder, 1, {})
    path = one_folder / "step-00000002"
    expected = steps_of(saved, 1)
    for other in chain[1:]:
        resumed = trainer(connected, *other)
        state_dict.restore(resumed, path)
        assert resumed.step == 2
        after = tensors(resumed)
        if connected.rank == 0:
            assert all(np.array_equal(before[name], after[name]) for name in before)
        near(steps_of(resumed, 1)[0], expected[0], 1e-5)
    if connected.rank == 0:
        alone = trainer(SerialComm())
        state_dict.restore(alone, path)
        near(steps_of(alone, 1)[0], expected[0], 1e-5)


@pytest.mark.parametrize(("pipeline", "tensor"), [(p, t) for p, t in grids() if p < N or N == 1][-2:])
def test_a_rank_that_differs_is_named_on_the_whole_grid(connected, everyone, pipeline, tensor):
    trained = trainer(connected, pipeline, tensor)
    steps_of(trained, 1)
    if connected.rank == N - 1:
        whole = [v for v in trained.replica.variables if v.path.endswith("norm/gamma")]
        whole[0].assign(whole[0] + np.float32(1e-6))
    try:
        trained.consistency_check.compare(1)
        said = "nothing"
    except LaunchError as error:
        said = str(error)
    assert everyone(said) == [said] * N
    assert (f"rank {N - 1}" in said) == (N > 1), said
    assert ("norm/gamma" in said) == (N > 1), said


@pytest.mark.skipif(N == 1, reason="one rank has one copy")
def test_copies_of_a_tied_table_are_compared_along_a_pipeline(connected, everyone):
    """No two ranks have the same stage, but the first and the last have the same table of tokens."""
    trained = trainer(connected, pipeline=N)
    assert len(trained.replica.tied) == 1
    table = trained.replica.tied[0]
    assert everyone(trained.replica.holds(table)) == [rank in (0, N - 1) for rank in range(N)]
    trained.consistency_check.compare(0)
    if connected.rank == N - 1:
        table.assign(table + np.float32(1e-6))
    said = ""
    try:
        trained.consistency_check.compare(1)
    except LaunchError as error:
        said = str(error)
    assert everyone(said) == [said] * N
    assert f"rank 0 and rank {N - 1} differ in {table.path}" in said
