"""`--run-dir X` alone goes on with X as it was; what is given counts, and nothing in X gets code run."""

import pytest

from tf_dist.config import Config
from tf_dist.errors import LaunchError, UsageError
from tf_dist.flags import from_command_line
from tf_dist.ops.hostfile import ranks_of_a_model


@pytest.fixture
def run(tmp_path):
    """``run(option=value, ...)``: the folder of a run with these options."""

    def made(**options):
        config = Config(**{"run_dir": "elsewhere", "layers": 2, "learning_rate": 3e-4, **options})
        (tmp_path / "config.yaml").write_text(config.as_yaml())
        return str(tmp_path)

    return made


def asked(*argv):
    return from_command_line(argv, "")[0]


def test_what_is_not_given_is_as_it_was(run):
    folder = run(steps=60, global_batch_size=8)
    config = asked("--run-dir", folder)
    assert (config.layers, config.learning_rate, config.steps, config.run_dir) == (2, 3e-4, 60, folder)
    assert asked("--run-dir", folder, "--layers", "3").layers == 3


def test_what_is_of_a_start_is_not_repeated(run):
    config = asked("--run-dir", run(resume="never", progress="none"))
    assert (config.resume, config.progress) == ("auto", "auto")


def test_another_beginning_has_no_options_of_the_run(run, tmp_path):
    folder = run()
    assert asked("--run-dir", folder, "--resume", "never").layers == Config().layers
    other = tmp_path / "other.yaml"
    other.write_text("width: 64\n")
    config = asked("--run-dir", folder, "--config", str(other))
    assert (config.width, config.layers) == (64, Config().layers)
    assert asked("--run-dir", str(tmp_path / "new")).layers == Config().layers


@pytest.mark.parametrize(
    ("was", "argv", "now"),
    [
        ({"epochs": 2}, ["--steps", "60"], {"steps": 60, "epochs": 0}),
        ({"steps": 60}, ["--epochs", "2"], {"steps": 0, "epochs": 2}),
        ({"strategy": "downpour", "staleness": 3}, ["--update", "allreduce"], {"staleness": 1}),
        ({"strategy": "diloco", "sync_every": 9}, ["--update", "local-sgd"], {"sync_every": 9}),
        ({"compression": "topk", "compression_density": 0.5}, ["--compression", "none"], {}),
        ({"pipeline_parallel": 2, "pipeline_cuts": "1"}, ["--pipeline-parallel", "1"], {"pipeline_cuts": ""}),
        # The size of a vocabulary that came of the text, which prepared tokens do not know.
        ({"tokenizer": "byte", "vocab_size": 257}, [], {"vocab_size": 0}),
        ({"tokenizer": "bpe", "vocab_size": 2048}, [], {"vocab_size": 0}),
        ({"tokenizer": "bpe", "vocab_size": 512}, [], {"vocab_size": 512}),
    ],
)
def test_options_that_cannot_hold_together_with_what_is_given(run, was, argv, now):
    config = asked("--run-dir", run(**was), *argv)
    assert {name: getattr(config, name) for name in now} == now


def test_a_run_does_not_name_code_that_is_executed(run):
    folder = run(model="theirs.models:build")
    with pytest.raises(LaunchError, match=r"add --model theirs\.models:build") as caught:
        asked("--run-dir", folder)
    assert "config.yaml" in str(caught.value)
    assert asked("--run-dir", folder, "--model", "theirs.models:build").layers == 2


def test_ranks_of_a_model_are_those_of_the_run(run):
    folder = run(pipeline_parallel=2, tensor_parallel=2)
    assert ranks_of_a_model(["train.py", "--run-dir", folder]) == 4
    assert ranks_of_a_model(["train.py", "--run-dir", folder, "--tensor-parallel", "1"]) == 2
    assert ranks_of_a_model(["train.py", "--run-dir", folder, "--resume", "never"]) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("layers: [", "is not YAML"),
        ("layer: 3", "Did you mean 'layers'"),
        ("layers: x", "config.yaml: layers is"),
    ],
)
def test_a_damaged_one_is_one_error(tmp_path, text, said):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=said):
        asked("--run-dir", str(tmp_path))


def test_a_run_of_an_older_version_calls_its_strategy_update(run, tmp_path):
    folder = run(strategy="diloco", sync_every=9)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("strategy: diloco", "update: diloco"))
    assert (asked("--run-dir", folder).strategy, asked("--run-dir", folder).sync_every) == ("diloco", 9)
    assert asked("--config", str(path)).strategy == "diloco"
    assert asked("--run-dir", folder, "--update", "local-sgd").strategy == "local-sgd"
    path.write_text("update: zero\nstrategy: zero\n")
    with pytest.raises(UsageError, match="strategy is there twice"):
        asked("--config", str(path))


def test_a_strategy_of_a_user_runs_only_where_the_command_line_names_it(run, tmp_path):
    folder = run(strategy="mine.own:Strategy")
    (tmp_path / "status.json").write_text("{}")
    for argv in (["--run-dir", folder], ["--config", str(tmp_path / "config.yaml")]):
        with pytest.raises(LaunchError, match=r"strategy is 'mine.own:Strategy'.*add --strategy mine\.own"):
            asked(*argv)
        assert asked(*argv, "--strategy", "mine.own:Strategy").strategy == "mine.own:Strategy"
