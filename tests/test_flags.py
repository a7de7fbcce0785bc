import dataclasses
import os
import string
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.config import Config, default_micro_batch
from tf_dist.errors import UsageError
from tf_dist.flags import CONFIG_LIMIT_BYTES, flag_values, from_command_line, from_mapping, parser

# The command line is a contract: other people's scripts use these names. Add here, never rename.
NAMES = """
    task architecture source_column target_column label_column context_column question_column answer_column
    start_column
    source_len target_len classes class_weights metric_rows
    sample_rate mels stack_frames image_size patch_size
    data documents end_of_text text_column tokenizer vocab_size val_fraction errors max_bytes prepared_dir
    model layers width heads seq_len dropout tie_embeddings pointer_generator precision
    normalization norm_epsilon norm_order activation ffn_width position_embedding rope_theta rope_scaling
    kv_heads head_width qk_norm bias sliding_window
    global_batch_size micro_batch_size steps epochs seed
    label_smoothing z_loss
    optimizer optimizer_args learning_rate min_learning_rate schedule decay_share warmup_steps weight_decay
    clip_norm
    init_from init_except freeze lora_rank lora_alpha lora_targets layer_lr_decay lr_scale
    on_spike spike_factor spike_skip max_bad_steps
    tensor_parallel pipeline_parallel sequence_parallel pipeline_schedule pipeline_cuts virtual_stages
    micro_batches_in_flight recompute strategy zero_stage
    staleness staleness_aware master_trains sync_every elastic_force sync_warmup_steps
    outer_lr outer_momentum outer_fragments outer_precision outer_delay
    compression compression_rank compression_least_rate compression_density compression_momentum
    compression_start
    backend allreduce chunk_bytes overlap autotune xla check_every on_mismatch min_ranks replicate
    stall_warn stall_abort threads_per_rank
    run_dir resume save_every async_save keep eval_every log_every report_to early_stopping callbacks progress
""".split()


def parse(*argv):
    return from_command_line(argv, "What it does.")[0]


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def refusal(*argv):
    with pytest.raises(UsageError) as caught:
        parse(*argv)
    assert caught.value.exit_code == 64
    return str(caught.value)


def test_the_names_are_frozen():
    assert [field.name for field in dataclasses.fields(Config)] == NAMES
    flags = {flag for action in parser("")._actions for flag in action.option_strings}
    assert flags == {"--" + name.replace("_", "-") for name in NAMES} | {
        "-h",
        "--help",
        "--no-tie-embeddings",
        "--no-pointer-generator",
        "--no-qk-norm",
        "--update",  # the older name of --strategy
    }


def test_defaults_then_file_then_flags(written):
    assert parse() == Config()
    path = written("layers: 7\nwidth: 64\nseq-len: 9\n")
    config = parse("--layers", "2", "--config", path)
    assert (config.layers, config.width, config.seq_len, config.heads) == (2, 64, 9, Config().heads)


def test_a_flag_overrides_a_file_that_alone_is_impossible(written):
    assert parse("--config", written("width: 10\nheads: 4\n"), "--heads", "5").heads == 5


def test_an_empty_file_is_all_defaults(written):
    assert parse("--config", written("# nothing yet\n")) == Config()


def test_every_kind_of_flag():
    config = parse(
        *("--data", "a.txt", "b/*.csv", "--layers=3", "--learning-rate", "3e-4", "--no-tie-embeddings"),
        *("--model", "mine.models:build", "--optimizer-args", "beta_2=0.99,epsilon=1e-8,amsgrad=true,name=x"),
    )
    assert config.data == ("a.txt", "b/*.csv")
    assert (config.layers, config.learning_rate, config.tie_embeddings) == (3, 3e-4, False)
    assert config.optimizer_args == {"beta_2": 0.99, "epsilon": 1e-8, "amsgrad": True, "name": "x"}


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),  # without a dot, YAML reads a string
        ("learning_rate: 1", "learning_rate", 1.0),
        ("data: poems.txt", "data", ("poems.txt",)),
        ("data: [a, b]", "data", ("a", "b")),
        ("tie_embeddings: no", "tie_embeddings", False),
        ("optimizer_args: {beta_1: 0.8}", "optimizer_args", {"beta_1": 0.8}),
        ("overlap: on", "overlap", "on"),  # which YAML reads as true
        ("overlap: off", "overlap", "off"),
    ],
)
def test_every_kind_of_value_in_a_file(written, line, field, value):
    read = getattr(parse("--config", written(line)), field)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "line",
    [
        "layers: 4.0", "layers: '4'", "layers: true", "layers: null", "layers: [4]",
        "learning_rate: fast", "learning_rate: true", "learning_rate: null", "learning_rate: []",
        "tie_embeddings: 1", "tie_embeddings: 'yes'",
        "data: 3", "data: []", "data: [a, 3]", "data: {a: b}",
        "optimizer_args: [beta_1]", "optimizer_args: beta_1=0.9",
        "model: 3", "run_dir: 2024-01-01", "schedule: null",
    ],
)  # fmt: skip
def test_values_of_another_type(written, line):
    path = written(line)
    text = refusal("--config", path)
    assert text.startswith(f"{path}: {line.split(':')[0]} is ")
    assert "is not of type" in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lerning_rate: 1.0", "unknown key 'lerning_rate'. Did you mean 'learning_rate'?"),
        ("warmup-step: 1", "unknown key 'warmup-step'. Did you mean 'warmup_steps'?"),
        ("zzz: 1", "unknown key 'zzz'"),
        ("3: 1", "unknown key 3"),
        ("- layers", "holds a list, not `key: value` lines"),
        ("layers", "holds a str"),
        ("layers: [", "is not YAML"),
        ("layers: !!python/object/apply:os.system ['true']", "is not YAML"),
        (b"layers: \xff\xfe\xfd", "is not YAML"),
        ("layers: 0", "layers is 0: it must be at least 1"),
        ("#" * (CONFIG_LIMIT_BYTES + 1), "larger than 1,048,576 bytes"),
        # What YAML's own constructors raise that is no YAMLError:
        ("run_dir: 2024-13-45", "run.yaml"),
        ("layers: " + "9" * 5000, "run.yaml"),
        ("learning_rate: " + "9" * 400, "learning_rate"),
        ("layers: " + "[" * 20000, "run.yaml"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_files_that_cannot_be_right(written, text, said):
    assert said in refusal("--config", written(text))


def test_files_that_are_not_there(tmp_path):
    assert "No such file" in refusal("--config", str(tmp_path / "none.yaml"))
    assert "cannot read the configuration" in refusal("--config", str(tmp_path))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--layer", "3"], "Did you mean '--layers'?"),
        (["--val-frac=0.1"], "Did you mean '--val-fraction'?"),  # no abbreviations: they would break later
        (["--zzzzzz"], "unrecognized arguments: --zzzzzz"),
        (["extra"], "unrecognized arguments: extra"),
        (["--layers", "3.5"], "invalid int value: '3.5'"),
        (["--layers", "-1"], "layers is -1: it must be at least 1"),
        (["--layers"], "expected one argument"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--learning-rate", "inf"], "must be finite"),
        (["--data"], "expected at least one argument"),
        (["--schedule", "cosin"], "Did you mean 'cosine'?"),
        (["--tie-embeddings=maybe"], "--tie-embeddings"),
        (["--optimizer-args", "beta_1"], "'beta_1' is not KEY=VALUE"),
        (["--optimizer-args", "0.9=beta_1"], "is not KEY=VALUE"),
        (["--optimizer-args", "beta_1=["], "--optimizer-args"),
    ],
)
def test_flags_that_cannot_be_right(argv, said):
    text = refusal(*argv)
    assert said in text
    assert "_key_values" not in text  # a name of ours, not of the user's


def test_keys_by_mapping_name_their_source():
    assert from_mapping({"seq-len": 3}, "x").seq_len == 3
    with pytest.raises(UsageError, match=r"^metadata: unknown key 'layer'. Did you mean 'layers'"):
        from_mapping({"layer": 3}, "metadata")


def test_only_some_options():
    made = parser("", ["data", "tokenizer"])
    flags = {flag for action in made._actions for flag in action.option_strings}
    assert flags == {"-h", "--help", "--data", "--tokenizer"}
    given = vars(made.parse_args(["--data", "a", "b"]))
    assert Config(**flag_values(given)) == Config(data=("a", "b"))


def test_print_config():
    assert from_command_line(["--print-config", "--steps", "3"], "") == (Config(steps=3), True)
    assert from_command_line([], "")[1] is False


def test_help_names_every_flag_and_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in shown
    for text in ("What it does.", "[stdlib]", "[0.001]", "constant|linear|cosine|wsd|1cycle"):
        assert text in shown


# Without control characters and the like: PyYAML reads a raw U+0085 back as a space.
words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=12)
sizes = st.integers(0, 2**31)
rates = st.floats(0, allow_infinity=False, allow_nan=False)
scalars = st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False), words)


@st.composite
def configs(draw):
    rows, micro_batches = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    heads = draw(st.integers(1, 9))
    return Config(
        data=tuple(draw(st.lists(words, min_size=1, max_size=3))),
        text_column=draw(words),
        tokenizer=draw(words),
        val_fraction=draw(st.floats(0, 0.99)),
        model=draw(st.sampled_from(["lstm", "transformer", "a.b:c"])),
        heads=heads,
        width=heads * draw(st.integers(1, 9)),
        tie_embeddings=draw(st.booleans()),
        global_batch_size=rows * micro_batches,
        micro_batch_size=draw(st.sampled_from([0, rows])),
        epochs=draw(sizes),
        seed=draw(sizes),
        optimizer_args=draw(st.dictionaries(st.text(string.ascii_letters, min_size=1), scalars, max_size=3)),
        learning_rate=draw(rates),
        schedule=draw(st.sampled_from(["constant", "linear", "cosine", "1cycle"])),
        run_dir=draw(words),
        resume=draw(words),
    )


@settings(max_examples=60)
@given(config=configs())
def test_yaml_round_trip(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round-trip.yaml"
    path.write_text(config.as_yaml(), encoding="utf-8")
    assert from_command_line(["--config", str(path)], "")[0] == config
    assert from_mapping(config.as_dict(), "again") == config


def test_a_chosen_micro_batch_stays_unsaid(written):
    config = parse("--config", written(Config(global_batch_size=40).as_yaml()))
    assert config.micro_batch_size == 0
    assert config.micro_batch_rows == default_micro_batch(40)


def test_help_imports_neither_tensorflow_nor_mpi():
    program = (
        "import sys\n"
        "from tf_dist.flags import from_command_line\n"
        "try:\n"
        "    from_command_line(['--help'], '')\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "heavy = {'tensorflow', 'keras', 'mpi4py', 'horovod'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "--global-batch-size" in done.stdout
