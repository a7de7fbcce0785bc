"""Options of strategies and compressions that they do not have, or that cannot be."""

import pytest

from tf_dist.config import Config
from tf_dist.errors import UsageError
from tf_dist.strategies.registry import FLAT_OPTIONS

OTHER = {
    "elastic_force": 0.5, "staleness": 2, "staleness_aware": "on", "master_trains": "on",
    "sync_every": 8, "sync_warmup_steps": 3,
    "outer_lr": 0.5, "outer_momentum": 0.5, "outer_fragments": 2, "outer_precision": "bfloat16",
    "outer_delay": 2,
    "compression_rank": 2, "compression_least_rate": 3.0, "compression_density": 0.1,
    "compression_momentum": 0.9, "compression_start": 5,
}  # fmt: skip


def refusal(**values):
    with pytest.raises(UsageError) as caught:
        Config(**values)
    return str(caught.value)


def test_every_such_option_is_tried():
    assert set(OTHER) == {name for name, one in FLAT_OPTIONS.items() if not one.metadata["may_be_idle"]}


@pytest.mark.parametrize("strategy", ["diloco", "downpour", "gossip"])
def test_jumps_of_the_loss_need_steps_that_all_take_together(strategy):
    said = refusal(strategy=strategy, on_spike="rollback")
    assert "Use --strategy allreduce or master or zero, or --on-spike off" in said
    assert Config(strategy="zero", on_spike="rollback").on_spike == "rollback"


@pytest.mark.parametrize("name", OTHER)
def test_an_option_of_another_strategy_is_refused(name):
    text = refusal(**{name: OTHER[name]})
    other, wanted = FLAT_OPTIONS[name].chooser, FLAT_OPTIONS[name].owners
    assert f"{name} is {OTHER[name]}, but {other} {getattr(Config(), other)} has no use for it" in text
    assert all(one in text for one in wanted)
    for one in wanted:
        more = {"compression_start": 5} if one == "onebit" else {}
        assert getattr(Config(**{other: one, name: OTHER[name], **more}), name) == OTHER[name]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"strategy": "diloco", "sync_every": -1}, "it must be at least 0"),
        ({"strategy": "local-sgd", "outer_fragments": 9}, "at most 8 fragments"),
        ({"strategy": "easgd", "elastic_force": 1.5}, "a spring throws"),
        ({"strategy": "gossip", "pipeline_parallel": 2}, "a worker has the whole model"),
        ({"strategy": "diloco", "outer_lr": 0.0}, "no meeting changes a weight"),
        ({"strategy": "diloco", "outer_momentum": 1.0}, "must be below 1"),
        ({"strategy": "local-sgd", "sync_every": 3, "outer_fragments": 4}, "at most 3 fragments"),
        ({"strategy": "diloco", "sync_every": 9, "outer_fragments": 2, "outer_delay": 5}, "at most 4 steps"),
        ({"strategy": "diloco", "outer_delay": 5, "outer_precision": "bfloat16"}, "travels as float32"),
        ({"strategy": "local-sgd", "sequence_parallel": 2}, "must sum their gradients in every step"),
        ({"strategy": "diloco", "backend": "horovod", "outer_precision": "bfloat16"}, "use backend mpi"),
        ({"strategy": "downpour", "staleness": -1}, "at least 0"),
        ({"strategy": "downpour", "tensor_parallel": 2}, "a worker has the whole model"),
        ({"strategy": "downpour", "backend": "horovod"}, "use backend mpi"),
        ({"strategy": "master", "compression": "bf16"}, "only sums of strategies allreduce"),
        ({"compression": "topk", "pipeline_parallel": 2}, "pipeline_parallel 2"),
        ({"compression": "topk", "compression_density": 1.5}, "at most 1"),
        ({"compression": "topk", "compression_density": 0.0}, "a share above 0"),
        ({"compression": "topk", "compression_momentum": 1.0}, "must be below 1"),
        ({"compression": "onebit"}, "Use compression_start 200"),
        ({"compression": "onebit", "compression_start": 9, "optimizer": "sgd"}, "optimizer adamw"),
        ({"compression": "topk", "backend": "horovod"}, "or compression powersgd"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(values, said):
    assert said in refusal(**values)
