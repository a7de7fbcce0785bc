"""Fine-tuning over real ranks against the same on one: frozen weights, adapters, learning rates by layer, and
initial weights from a checkpoint, on data-parallel ranks, ZeRO's stages, and ranks that share a model."""

from types import SimpleNamespace

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.ranks(2)

V, T, G, B = 30, 8, 8, 2
SIZES = {"vocab_size": V, "seq_len": T, "layers": 2, "width": 16, "heads": 4, "seed": 7}
TOKENS = np.random.default_rng(1).integers(0, V, 700).astype(np.uint16)
STEPS = 3
TUNING = {
    "frozen": {"freeze": "layer_0_*,embedding,positions"},
    "all but the last norm": {"freeze": "*,!final_norm"},
    "lora": {"lora_rank": 2},
    "lora of a part, beside trained norms": {
        "lora_rank": 2, "lora_targets": "query_key_value", "freeze": "*,!*norm",
    },
    "rates": {"layer_lr_decay": 0.5, "lr_scale": "bias=0.1,positions=3"},
    "lora with rates": {"lora_rank": 2, "layer_lr_decay": 0.5},
}  # fmt: skip


def trainer(comm, pipeline=1, tensor=1, folder=None, **more):
    """A trainer as ``tf-dist train`` makes it; its weights are those of a checkpoint, if there is one."""
    from tf_dist.optim import optimizers
    from tf_dist.run.init_from import initialize
    from tf_dist.training.model import model_for
    from tf_dist.training.trainer import Trainer

    mesh = Mesh(comm, pipeline, 1, tensor)
    given = {**SIZES, "learning_rate": 1e-2, "init_from": str(folder or ""), **more}
    config = Config(**given, pipeline_parallel=pipeline, tensor_parallel=tensor)
    model = model_for(config, mesh)
    made = Trainer(
        model, optimizers.build(config, model, 20), comm, config.chosen_strategy(),
        global_batch_size=G, micro_batch_size=B, seq_len=T, clip_norm=0.5, seed=3, mesh=mesh, autotune="off",
    )  # fmt: skip
    if folder:
        initialize(made, config, SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=V)))
    return made


def weights_of(trained):
    """The whole weights by path; on rank 0."""
    state = trained.whole()
    return {name.split("/", 2)[-1]: np.array(array) for name, array in state.tensors(state.weights)}


def result_of(trained):
    before = weights_of(trained)
    trained.fit(TOKENS, steps=STEPS)
    return trained.check_equal(), before, weights_of(trained)


def alone(**more):
    """What one rank has, made by rank 0 for all."""
    made = result_of(trainer(SerialComm(), **more)) if MPI.COMM_WORLD.rank == 0 else None
    return MPI.COMM_WORLD.bcast(made)


@pytest.fixture(scope="module")
def serial(connected):
    known = {}

    def of(model, tuning):
        if (model, tuning) not in known:
            known[model, tuning] = alone(model=model, **TUNING[tuning])
        return known[model, tuning]

    return of


STRATEGIES = {
    "allreduce": {"strategy": "allreduce"},
    "master": {"strategy": "master"},
    "zero 1": {"strategy": "zero", "zero_stage": 1},
    "zero 2": {"strategy": "zero", "zero_stage": 2},
    "zero 3": {"strategy": "zero", "zero_stage": 3},
}


# Every way once, with an all-reduce and two stages of ZeRO; the other pairs repeat them.
ONCE = [("allreduce", "rates"), ("zero 2", "frozen"), ("zero 3", "lora with rates")]


def pairs():
    for strategy in STRATEGIES:
        for tuning in ("frozen", "lora with rates", "rates"):
            more = () if (strategy, tuning) in ONCE else pytest.mark.extended
            yield pytest.param(strategy, tuning, marks=more)


@pytest.mark.parametrize(("strategy", "tuning"), list(pairs()))
def test_the_bits_are_those_of_one_rank(connected, serial, strategy, tuning):
    sha256, before, after = result_of(trainer(connected, **STRATEGIES[strategy], **TUNING[tuning]))
    wanted, before_alone, after_alone = serial("transformer", tuning)
    assert sha256 == wanted
    if connected.rank == 0:
        assert list(after) == list(after_alone)
        for path in after:
            np.testing.assert_array_equal(before[path], before_alone[path])


@pytest.mark.parametrize("tuning", [name for name in TUNING if name != "rates"])
def test_only_what_is_trained_changes(connected, serial, tuning):
    _, before, after = serial("transformer", tuning)
    changed = {path for path in before if (before[path] != after[path]).any()}
    wanted = {
        "frozen": {path for path in before if path.startswith(("layer_1", "final"))},
        "all but the last norm": {"final_norm/gamma", "final_norm/beta"},
        "lora": {path for path in before if "_lora_" in path},
        "lora of a part, beside trained norms": {
            path for path in before if "_lora_" in path or "norm" in path
        },
        "lora with rates": {path for path in before if "_lora_" in path},
    }[tuning]
    assert changed == wanted
    count = {"lora": 16, "lora with rates": 16, "lora of a part, beside trained norms": 4}.get(tuning, 0)
    assert sum("_lora_" in path for path in before) == count


def axes():
    often = [
        ("transformer", "lora", "tensor"),
        ("transformer", "frozen", "pipeline"),
    ]
    for model in ("transformer", "lstm"):
        for tuning in ("frozen", "lora", "rates"):
            for axis in ("tensor", "pipeline"):
                more = () if (model, tuning, axis) in often else pytest.mark.extended
                yield pytest.param(model, tuning, axis, marks=more)


@pytest.mark.parametrize(("model", "tuning", "axis"), list(axes()))
def test_ranks_that_share_a_model_have_its_numbers(connected, model, tuning, axis, serial):
    """Within rounding, as everywhere on a grid (docs/parallelism.md)."""
    options = dict(TUNING[tuning])
    if model == "lstm":
        options = {"frozen": {"freeze": "layer_0"}, "rates": {"layer_lr_decay": 0.5}}.get(tuning, options)
    _, before_alone, after_alone = alone(model=model, **options) if model == "lstm" else serial(model, tuning)
    if (model, tuning, axis) == ("lstm", "frozen", "pipeline"):
        options["freeze"] = "layer_0/lstm_cell/bias"  # no stage without weights
        _, before_alone, after_alone = alone(model=model, **options)
    _, before, after = result_of(trainer(connected, **{axis: 2}, model=model, **options))
    if connected.rank == 0:
        assert list(after) == list(after_alone)
        for path in after:
            np.testing.assert_array_equal(before[path], before_alone[path], err_msg=path)
            np.testing.assert_allclose(after[path], after_alone[path], rtol=0, atol=1e-4, err_msg=path)


def test_a_stage_without_trained_weights_is_refused(connected):
    from tf_dist.errors import UsageError

    with pytest.raises(UsageError, match=r"too few layers with trained weights for 2 stages.*--freeze"):
        trainer(connected, pipeline=2, freeze="*,!layer_1_feed_forward_out")


def test_zero_3_in_segments_some_of_which_are_frozen(connected, monkeypatch):
    from tf_dist.zero import stage3
    from tf_dist.zero.partition import segments

    monkeypatch.setattr(stage3, "segments", lambda model: segments(model, together=1))
    options = {"freeze": "embedding,positions,layer_0_*"}
    wanted = alone(**options)
    trained = trainer(connected, strategy="zero", zero_stage=3, **options)
    assert len(trained.replica.segments) > 2
    _, _, after = result_of(trained)
    for path in after if connected.rank == 0 else ():  # last bits differ between segments (docs/exactness.md)
        np.testing.assert_allclose(after[path], wanted[2][path], rtol=0, atol=1e-4, err_msg=path)


@pytest.fixture(scope="module")
def checkpoint(connected, tmp_path_factory):
    """Of a training of the plain model, and its weights."""
    from tf_dist.training import state_dict

    folder = MPI.COMM_WORLD.bcast(tmp_path_factory.mktemp("run") / "checkpoints")
    weights = None
    if connected.rank == 0:
        trained = trainer(SerialComm(), **{"seed": 11})
        trained.fit(TOKENS, steps=2)
        weights = weights_of(trained)
        facts = {"config": Config(**SIZES).as_dict()}
        state_dict.save(trained, folder, 1, facts)
    return folder / "step-00000002", MPI.COMM_WORLD.bcast(weights)


@pytest.mark.parametrize(
    "ranks",
    [
        {},
        {"strategy": "zero", "zero_stage": 3},
        {"tensor": 2},
        pytest.param({"strategy": "zero", "zero_stage": 1}, marks=pytest.mark.extended),
        pytest.param({"pipeline": 2}, marks=pytest.mark.extended),
        pytest.param({"strategy": "diloco"}, marks=pytest.mark.extended),
    ],
    ids=str,
)
def test_initial_weights_from_a_checkpoint_on_every_grid(connected, checkpoint, ranks):
    path, wanted = checkpoint
    trained = trainer(connected, folder=path, lora_rank=2, **ranks)
    found = weights_of(trained)
    if connected.rank == 0:
        for name in wanted:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
        assert len(found) == len(wanted) + 16
    assert trained.step == 0
    trained.fit(TOKENS, steps=2)
    trained.check_equal()
    after = weights_of(trained)
    if connected.rank == 0:
        for name in wanted:
            np.testing.assert_array_equal(after[name], wanted[name], err_msg=name)
