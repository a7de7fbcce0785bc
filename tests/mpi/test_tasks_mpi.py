"""Tasks on real ranks against one rank: weights, validation with its metrics, resumes.

Models are small. Held-out rows are few, so that ranks have unequal numbers of micro-batches of them.
"""

import json
import time

import numpy as np
import pytest
from mpi4py import MPI

from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.errors import LaunchError
from tf_dist.parallel.mesh import Mesh

pytestmark = pytest.mark.ranks(2, 4)

N = MPI.COMM_WORLD.size
STEPS = 3
SIZES = {
    "layers": 2, "width": 16, "heads": 4, "dropout": 0.1, "seq_len": 12, "global_batch_size": 8,
    "micro_batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1, "seed": 7, "tokenizer": "byte",
    "val_fraction": 0.1,
}  # fmt: skip
WORDS = "red green blue small large round old new".split()
TASKS = {
    "classify": {"task": "classify"},
    "classify lstm": {"task": "classify", "model": "lstm"},
    "translate": {"task": "translate", "target_len": 6},
    "translate prefix": {"task": "translate", "target_len": 6, "architecture": "prefix-decoder"},
    "translate lstm": {"task": "translate", "target_len": 6, "model": "lstm"},
    "translate lstm prefix": {
        "task": "translate", "target_len": 6, "model": "lstm", "architecture": "prefix-decoder",
    },
    "translate pointing": {"task": "translate", "target_len": 6, "pointer_generator": True},
    "masked-lm": {"task": "masked-lm"},
}  # fmt: skip


def write_table(folder, rows=100):
    rng = np.random.default_rng(1)
    lines = []
    for number in range(rows):
        words = rng.choice(WORDS, 2)
        text = f"{' '.join(words)} {number}"
        lines.append(
            json.dumps({"text": text, "label": words[0], "source": text, "target": words[1].upper()}) + "\n"
        )
    (folder / "table.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def data(connected, tmp_path_factory):
    """``data(name)``: the options of a run, with its rows prepared in a folder of all ranks."""
    folder = MPI.COMM_WORLD.bcast(tmp_path_factory.mktemp("tasks") if connected.rank == 0 else None)
    if connected.rank == 0:
        write_table(folder)
    connected.barrier()
    made = {}

    def of(name):
        if name not in made:
            from tf_dist.cli.train import sizes_of_data
            from tf_dist.run.prepare_corpus import shared_corpus

            config = Config(
                **SIZES, **TASKS[name], data=(str(folder / "table.jsonl"),), prepared_dir=str(folder / "p")
            )
            corpus = shared_corpus(config, connected, folder / "no-registry.yaml")
            made[name] = sizes_of_data(config, corpus), corpus
        return made[name]

    return of


def patiently():
    """Wait for all ranks without a core of one's own."""
    request = MPI.COMM_WORLD.Ibarrier()
    while not request.Test():
        time.sleep(0.005)


def trainer_and_data(comm, config, corpus):
    from tf_dist.cli.train import trainer_for
    from tf_dist.run.task_data import TaskData, TaskMetrics

    rows = TaskData(config, corpus)
    trainer = trainer_for(config, Mesh(comm, *config.degrees), 20)
    if rows.task.metrics:
        trainer.metrics.append(TaskMetrics(rows, config.metric_rows))
    return trainer, rows


def with_options(config, **options):
    import dataclasses

    return dataclasses.replace(config, **options)


def trained(comm, config, corpus, steps=STEPS):
    """Trainer, losses, validation after some steps, and all weights on rank 0."""
    trainer, rows = trainer_and_data(comm, config, corpus)
    training = rows.rows("train")
    sampler = trainer.sampler(training)
    losses = [trainer.train_step(training, sampler)["loss"] for _ in range(steps)]
    return trainer, losses, trainer.validate(rows.rows("val")), weights(trainer)


def weights(trainer):
    whole = trainer.whole()
    return {name: np.array(array) for name, array in whole.tensors() if name.startswith("weights/")}


@pytest.fixture(scope="module")
def alone(connected, data):
    """``alone(name, **options)``: of one rank, which computes for all."""
    made = {}

    def of(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            config, corpus = data(name)
            if connected.rank == 0:
                trainer, *found = trained(SerialComm(), with_options(config, **options), corpus)
                made[key] = trainer.whole().weights_sha256(), *found
            patiently()
            made[key] = MPI.COMM_WORLD.bcast(made.get(key))
        return made[key]

    return of


def near(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=tolerance, rel=tolerance), name


DATA_PARALLEL = {
    "allreduce": {},
    "master": {"strategy": "master"},
    "zero 1": {"strategy": "zero", "zero_stage": 1},
    "zero 2": {"strategy": "zero", "zero_stage": 2},
    "zero 3": {"strategy": "zero", "zero_stage": 3},
}


def more(*values):
    """What repeats other cases for other models: with ``TF_DIST_TESTS=all``."""
    return pytest.param(*values, marks=pytest.mark.extended)


OTHERS = ("classify lstm", "translate", "translate prefix", "translate lstm", "translate pointing")
OTHERS += ("translate lstm prefix",)
NAMES_OF_2 = [
    *((name, "allreduce") for name in TASKS if name not in OTHERS), ("translate", "zero 3"),
    ("classify", "zero 2"),
    *(more(name, "allreduce") for name in OTHERS), more("classify", "zero 1"),
    more("translate", "zero 2"), more("classify", "zero 3"), more("translate prefix", "zero 3"),
    more("translate lstm", "zero 3"), more("translate pointing", "zero 3"), more("masked-lm", "zero 3"),
    more("translate", "master"),
]  # fmt: skip
NAMES_OF_4 = [("translate", "zero 3"), ("classify", "allreduce")]


@pytest.mark.parametrize(("name", "how"), NAMES_OF_4 if N == 4 else NAMES_OF_2)
def test_data_parallel_ranks_are_one_rank(connected, everyone, data, alone, name, how):
    config, corpus = data(name)
    sha256, losses, result, expected = alone(name)
    held_out = corpus.meta["rows"]["val"] if "rows" in corpus.meta else 0
    assert not held_out or -(-held_out // config.micro_batch_rows) % N, "every rank has as many"
    trainer, *found, own = trained(connected, with_options(config, **DATA_PARALLEL[how]), corpus)
    assert everyone(found) == [everyone(found)[0]] * N
    in_segments = how == "zero 3" and len(trainer.replica.segments) > 1
    if in_segments:
        near(found[1], result)
        if connected.rank == 0:
            for tensor, theirs in own.items():
                np.testing.assert_allclose(theirs, expected[tensor], rtol=0, atol=1e-6)
    else:
        assert found == [losses, result]
        assert trainer.whole().weights_sha256() == sha256


GRIDS_OF_2 = [
    more("classify", 1, 2), ("classify", 2, 1), more("translate", 1, 2), more("translate", 2, 1),
    ("translate pointing", 2, 1), more("translate pointing", 1, 2),
    more("translate prefix", 2, 1), more("translate prefix", 1, 2), more("masked-lm", 2, 1),
    more("masked-lm", 1, 2), more("translate lstm", 1, 2),
]  # fmt: skip
GRIDS_OF_4 = [("translate", 2, 2), ("translate", 1, 2), ("classify", 2, 1), ("translate prefix", 2, 2)]


@pytest.mark.parametrize(("name", "pipeline", "tensor"), GRIDS_OF_4 if N == 4 else GRIDS_OF_2)
def test_a_grid_is_one_rank(connected, everyone, data, alone, name, pipeline, tensor):
    config, corpus = data(name)
    options = {"pipeline_parallel": pipeline, "tensor_parallel": tensor}
    update = {"strategy": "zero"} if pipeline * tensor < N else {}
    _, losses, result, expected = alone(name)
    trainer, *found, own = trained(connected, with_options(config, **options, **update), corpus)
    assert everyone(found) == [everyone(found)[0]] * N
    assert found[0] == pytest.approx(losses, abs=1e-5)
    near(found[1], result)
    if connected.rank == 0:
        assert own.keys() == expected.keys()
        for tensor_name, theirs in own.items():
            np.testing.assert_allclose(theirs, expected[tensor_name], rtol=0, atol=2e-5, err_msg=tensor_name)
    trainer.check_equal()


@pytest.mark.ranks(2)
@pytest.mark.parametrize("name", [more("classify"), more("translate")])
def test_bfloat16_is_one_rank(connected, everyone, data, alone, name):
    config, corpus = data(name)
    sha256, losses, result, _ = alone(name, precision="bfloat16")
    trainer, *found, _ = trained(connected, with_options(config, precision="bfloat16"), corpus)
    assert everyone(found) == [[losses, result]] * N
    assert trainer.whole().weights_sha256() == sha256


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("classify", "diloco"), *(more("translate", one) for one in ("local-sgd", "diloco", "downpour"))],
)
def test_strategies_without_lockstep_train_and_validate_alike(connected, everyone, data, name, strategy):
    config, corpus = data(name)
    trainer, rows = trainer_and_data(connected, with_options(config, strategy=strategy), corpus)
    result = trainer.fit(rows.rows("train"), steps=8, validation=rows.rows("val"), eval_every=4, callbacks=[])
    final = trainer.validate(rows.rows("val"))
    assert everyone(final) == [final] * N
    wanted = {"translate": {"val_bleu", "val_chrf"}, "classify": {"val_accuracy", "val_macro_f1"}}[name]
    assert {"val_loss", *wanted} <= final.keys() and np.isfinite(list(final.values())).all()
    assert result is not None


@pytest.mark.ranks(2)
@pytest.mark.parametrize(
    ("name", "first", "then"),
    [
        ("classify", {"strategy": "zero", "zero_stage": 3}, {"pipeline_parallel": 2}),
        more("translate", {"pipeline_parallel": 2}, {"tensor_parallel": 2}),
        more("masked-lm", {}, {"strategy": "zero", "zero_stage": 3}),
    ],
)
def test_a_checkpoint_goes_on_on_another_grid(connected, data, alone, one_folder, name, first, then):
    from tf_dist.training import state_dict

    config, corpus = data(name)
    saved, *_ = trained(connected, with_options(config, **first), corpus, 2)
    state_dict.save(saved, one_folder, 1, {})
    resumed, rows = trainer_and_data(connected, with_options(config, **then), corpus)
    state_dict.restore(resumed, one_folder / "step-00000002")
    training = rows.rows("train")
    loss = resumed.train_step(training, resumed.sampler(training))["loss"]
    _, losses, result, _ = alone(name)
    assert loss == pytest.approx(losses[2], abs=1e-5)
    near(resumed.validate(rows.rows("val")), result)


@pytest.mark.ranks(2)
@pytest.mark.parametrize("held_out", [1, more(3), 5, more(7)])
def test_any_number_of_rows_and_micro_batches_is_predicted(connected, everyone, data, held_out):
    """With ZeRO-3 each forward pass is a collective: ranks with fewer micro-batches go on with padding."""
    from tf_dist.data.rows import Examples
    from tf_dist.training.predictions import predictions

    config, corpus = data("classify")
    found = []
    for comm, options in ((SerialComm(), {}), (connected, {"strategy": "zero", "zero_stage": 3})):
        trainer, rows = trainer_and_data(comm, with_options(config, **options), corpus)
        width = rows.seq_len + 1
        few = Examples(corpus.train[: held_out * width], rows.seq_len, 1)
        trainer.metrics.clear()  # of other rows
        seen = []

        def predict(runner, x, seen=seen):
            seen.append(len(x))
            return np.argmax(runner.outputs(x), axis=-1).astype(np.int32)

        found.append(predictions(trainer.runner, trainer.mesh, trainer.rows, few, held_out, predict))
        assert found[-1].shape == (held_out, 1)
        near(trainer.validate(few), {**trainer.validate(few)})
    np.testing.assert_array_equal(*found)
    assert everyone(found[1].tolist()) == [found[0].tolist()] * N


@pytest.mark.ranks(2)
def test_ranks_with_other_rows_are_told(connected, everyone, data):
    from tf_dist.data.rows import Examples

    config, corpus = data("classify")
    trainer, rows = trainer_and_data(connected, config, corpus)
    words = np.array(corpus.train)
    words[-1] ^= connected.rank
    with pytest.raises(LaunchError) as caught:
        trainer.fit(Examples(words, rows.seq_len, 1), steps=1)
    assert everyone(str(caught.value)) == [str(caught.value)] * N
