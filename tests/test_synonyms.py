"""What other tools call our options is answered with ours; what we have not, with what to do instead."""

import dataclasses

import pytest

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.flags import Parser, from_command_line, from_mapping
from tf_dist.synonyms import TABLE, hint, ours

NAMES = [field.name.replace("_", "-") for field in dataclasses.fields(Config)]
OTHERS = """
    lr learning-rate    batch-size global-batch-size    bs global-batch-size    n-layer layers    n-head heads
    n-embd width    block-size seq-len    max-steps steps    max-iters steps    num-layers layers
    hidden-size width    output-dir run-dir    out-dir run-dir    num-train-epochs epochs    num-epochs epochs
    num-attention-heads heads    num-heads heads    d-model width    max-seq-length seq-len
    seq-length seq-len    per-device-train-batch-size micro-batch-size    lr-scheduler-type schedule
    grad-clip clip-norm
    max-grad-norm clip-norm    save-steps save-every    eval-interval eval-every    logging-steps log-every
    warmup-iters warmup-steps    wd weight-decay    optim optimizer    tp tensor-parallel
    pipeline-model-parallel-size pipeline-parallel    context-parallel-size sequence-parallel
    dataset data    resume-from-checkpoint resume    dtype precision    bf16 precision
    adam-beta2 optimizer-args    gradient-checkpointing recompute    num-threads threads-per-rank
    save-total-limit keep    zero zero-stage
""".split()


@pytest.mark.parametrize(("theirs", "mine"), list(zip(OTHERS[0::2], OTHERS[1::2], strict=True)))
def test_names_of_other_tools(theirs, mine):
    for word in (f"--{theirs}", f"--{theirs.replace('-', '_')}=3"):
        with pytest.raises(UsageError) as caught:
            from_command_line([word, "3"], "")
        assert f"Did you mean '--{mine}'?" in str(caught.value)


def test_keys_of_a_file():
    with pytest.raises(UsageError, match=r"unknown key 'lr'\. Did you mean 'learning_rate'\?"):
        from_mapping({"lr": 1e-3}, "run.yaml")
    with pytest.raises(UsageError, match=r"Did you mean 'strategy'\?"):
        from_mapping({"algorithm": "zero"}, "run.yaml")


def test_several_at_once():
    with pytest.raises(UsageError) as caught:
        from_command_line(["--lr", "1", "--steps", "2", "--bs=3", "--grad-accum", "4", "--nproc", "2"], "")
    said = str(caught.value)
    assert "Did you mean '--learning-rate' for --lr, '--global-batch-size' for --bs? " in said
    assert "--grad-accum: micro-batches are accumulated" in said and "mpirun -np N" in said


def test_a_program_names_what_it_has_itself():
    writer = Parser("", prog="generate.py")
    for flag in ("--tokens", "--run-dir", "--checkpoint", "--top-k"):
        writer.add_argument(flag)
    for theirs, mine in (("--max-new-tokens", "tokens"), ("--model", "run-dir"), ("--ckpt", "checkpoint")):
        with pytest.raises(UsageError, match=f"Did you mean '--{mine}'"):
            writer.parse_args([theirs, "3"])
    with pytest.raises(UsageError) as caught:
        writer.parse_args(["--lr", "3"])
    assert "Did you mean" not in str(caught.value)


def test_numbers_and_known_flags_are_not_unknown_ones():
    assert hint([], ["--steps"]) == ""
    assert hint(["-lr"], ["--learning-rate"]) == ". Did you mean '--learning-rate'?"
    with pytest.raises(UsageError) as caught:
        from_command_line(["--steps", "-1.5"], "")
    assert "Did you mean" not in str(caught.value)


def test_the_table_leads_to_options_that_there_are():
    programs = {"tokens", "prompt", "temperature", "top-k", "top-p", "checkpoint", "config", "print-config"}
    for word, meant in TABLE.items():
        assert set(meant) <= {*NAMES, *programs}, word
    assert ours("layer", NAMES) == "layers"  # not in the table, but near
    assert ours("Zzz", NAMES) == ""
