"""Options of updates and compressions that they do not have, or that cannot be."""

import pytest

from tf_dist.choices import BELONGS_TO
from tf_dist.config import Config
from tf_dist.errors import UsageError

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
    assert set(OTHER) == set(BELONGS_TO)


@pytest.mark.parametrize("update", ["diloco", "downpour", "gossip"])
def test_jumps_of_the_loss_need_steps_that_all_take_together(update):
    assert "--on-spike off" in refusal(update=update, on_spike="rollback")
    assert Config(update="zero", on_spike="rollback").on_spike == "rollback"


@pytest.mark.parametrize("name", OTHER)
def test_an_option_of_another_update_is_refused(name):
    text = refusal(**{name: OTHER[name]})
    other, wanted = BELONGS_TO[name]
    assert f"{name} is {OTHER[name]}, but {other} {getattr(Config(), other)} has no use for it" in text
    assert all(one in text for one in wanted)
    for one in wanted:
        more = {"compression_start": 5} if one == "onebit" else {}
        assert getattr(Config(**{other: one, name: OTHER[name], **more}), name) == OTHER[name]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"update": "diloco", "sync_every": -1}, "it must be at least 0"),
        ({"update": "local-sgd", "outer_fragments": 9}, "at most 8 fragments"),
        ({"update": "easgd", "elastic_force": 1.5}, "a spring throws"),
        ({"update": "gossip", "pipeline_parallel": 2}, "a worker has the whole model"),
        ({"update": "diloco", "outer_lr": 0.0}, "no meeting changes a weight"),
        ({"update": "diloco", "outer_momentum": 1.0}, "must be below 1"),
        ({"update": "local-sgd", "sync_every": 3, "outer_fragments": 4}, "at most 3 fragments"),
        ({"update": "diloco", "sync_every": 9, "outer_fragments": 2, "outer_delay": 5}, "at most 4 steps"),
        ({"update": "diloco", "outer_delay": 5, "outer_precision": "bfloat16"}, "travels as float32"),
        ({"update": "local-sgd", "sequence_parallel": 2}, "must sum their gradients in every step"),
        ({"update": "diloco", "backend": "horovod", "outer_precision": "bfloat16"}, "use backend mpi"),
        ({"update": "downpour", "staleness": -1}, "at least 0"),
        ({"update": "downpour", "tensor_parallel": 2}, "a worker has the whole model"),
        ({"update": "downpour", "backend": "horovod"}, "use backend mpi"),
        ({"update": "master", "compression": "bf16"}, "only update allreduce sums"),
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
