"""Every option has one home, its field in a component: flags, files and Python take the default from it."""

import dataclasses
import inspect
from collections import Counter

import pytest
import yaml

from tf_dist.comm.runtime.launch import connect
from tf_dist.config import FIELDS, Config, on_resume
from tf_dist.config.parallelism import ParallelismOptions
from tf_dist.config.pipeline import PipelineOptions
from tf_dist.config.run import COMPONENTS
from tf_dist.config.strategy import StrategyOptions
from tf_dist.data.corpus import Corpus
from tf_dist.data.prepare import prepare
from tf_dist.errors import UsageError
from tf_dist.flags import from_command_line, from_mapping, parser
from tf_dist.parallel.compress import COMPRESSORS
from tf_dist.parallel.mesh import AXES
from tf_dist.strategies.registry import FLAT_OPTIONS, STRATEGIES

DEFAULTS = {name: getattr(Config(), name) for name in FIELDS}
HOME_OF = {field.name: one for one in COMPONENTS for field in dataclasses.fields(one)}
# What a run that is resumed may do with an option is a contract: these must be the same ...
SAME = """
    model layers width heads seq_len tie_embeddings vocab_size global_batch_size seed optimizer
    freeze lora_rank lora_alpha lora_targets
    normalization norm_epsilon norm_order activation ffn_width position_embedding rope_theta rope_scaling
    kv_heads head_width qk_norm bias sliding_window
    pointer_generator task architecture source_len target_len classes documents end_of_text
    sample_rate mels stack_frames image_size patch_size
""".split()
# ... and these may differ without a word; of all others it is told.
FREE = """
    run_dir resume save_every async_save keep log_every report_to progress prepared_dir threads_per_rank
    check_every min_ranks replicate max_bad_steps on_mismatch stall_warn stall_abort autotune tensor_parallel
    pipeline_parallel sequence_parallel pipeline_schedule pipeline_cuts virtual_stages micro_batches_in_flight
    recompute zero_stage
""".split()


@pytest.mark.parametrize("name", FIELDS)
def test_the_command_line_a_file_and_python_have_the_same_default(name):
    wanted = DEFAULTS[name]
    assert getattr(HOME_OF[name](), name) == wanted
    assert getattr(from_command_line([], "")[0], name) == wanted
    assert getattr(from_mapping({}, "run.yaml"), name) == wanted
    written = yaml.safe_load(Config().as_yaml())[name]
    assert getattr(from_mapping({name: written}, "run.yaml"), name) == wanted
    (action,) = [one for one in parser("")._actions if one.dest == name]
    shown = " ".join(wanted) if isinstance(wanted, tuple) else wanted
    assert action.help.endswith(f"[{shown}]") or wanted in ("", {})


def test_an_option_is_in_one_component():
    found = Counter(field.name for one in COMPONENTS for field in dataclasses.fields(one))
    assert set(found) == set(FIELDS) and set(found.values()) == {1}
    for component in COMPONENTS:
        assert Config().part(component) == component()


def test_a_component_is_checked_by_itself():
    with pytest.raises(UsageError, match="tensor_parallel is 0: it must be at least 1"):
        ParallelismOptions(tensor_parallel=0)
    with pytest.raises(UsageError, match="choose one of gpipe"):
        PipelineOptions(pipeline_schedule="fifo")
    config = Config(tensor_parallel=2, pipeline_parallel=2)
    assert (config.degrees, config.ranks_of_a_model) == ((2, 1, 2), 4)
    assert config.part(ParallelismOptions).above_1 == {"tensor_parallel": 2, "pipeline_parallel": 2}


def test_degrees_are_those_of_a_mesh():
    names = {field.name for field in dataclasses.fields(ParallelismOptions)}
    assert names == {f"{axis}_parallel" for axis in AXES if axis != "data"}


def test_options_of_strategies_are_their_own():
    names = {field.name for field in dataclasses.fields(StrategyOptions)}
    assert names == {"strategy", "compression", *FLAT_OPTIONS}
    for name, option in FLAT_OPTIONS.items():
        assert FIELDS[name].metadata == option.metadata
        classes = STRATEGIES if option.chooser == "strategy" else COMPRESSORS
        own = {
            owner: getattr(classes[owner].Options(), field)
            for owner, field in option.owners.items()
            if hasattr(classes[owner].Options, field)
        }
        # Where they differ, 0 is what is usual of each, and --help says of what.
        if set(own.values()) != {DEFAULTS[name]}:
            assert DEFAULTS[name] == 0
            assert all(f"{owner} {value}" in option.metadata["text"] for owner, value in own.items())


def test_what_a_resumed_run_may_do_with_an_option():
    assert sorted(on_resume("same")) == sorted(SAME)
    assert sorted(on_resume("free", "of a start")) == sorted(FREE)
    assert on_resume("of a start") == ("run_dir", "resume", "progress")


@pytest.mark.parametrize("function", [connect, prepare, Corpus], ids=lambda one: one.__name__)
def test_functions_that_take_an_option_by_name_have_its_default(function):
    parameters = inspect.signature(function).parameters
    given = {name: one.default for name, one in parameters.items() if name in FIELDS}
    assert given == {name: DEFAULTS[name] for name in given} and len(given) >= 3
