"""What a rank certainly holds of a model, by the options of a run."""

import pytest

from tests.thread_comm import on_ranks
from tf_dist.comm.transport.base import SerialComm
from tf_dist.config import Config
from tf_dist.models.build import build
from tf_dist.models.meta_init import outline
from tf_dist.parallel.mesh import Mesh
from tf_dist.training import memory_estimate

SIZES = {"layers": 1, "width": 8, "heads": 2, "seq_len": 4, "vocab_size": 16}


def wanted_of(monkeypatch, config, model):
    found = []
    monkeypatch.setattr(memory_estimate, "refuse_too_much", lambda comm, wanted, what: found.append(wanted))
    memory_estimate.check_room(model, config, Mesh(SerialComm()))
    return found[0]


@pytest.mark.parametrize(("rows", "of_each"), [(8, 20), (4, 24), (2, 24)])
def test_one_rank_has_weights_state_gradients_and_their_sum(monkeypatch, rows, of_each):
    config = Config(**SIZES, global_batch_size=8, micro_batch_size=rows)
    with outline():
        model = build(config)
    parameters = model.count_params()
    assert wanted_of(monkeypatch, config, model) == of_each * parameters
    # Those that are there already are not asked for again.
    assert wanted_of(monkeypatch, config, build(config)) == (of_each - 4) * parameters


@pytest.mark.parametrize(
    ("options", "of_each"),
    [
        ({"strategy": "allreduce"}, [16, 16]),
        ({"strategy": "zero", "zero_stage": 1}, [12, 12]),
        ({"strategy": "zero", "zero_stage": 2}, [10, 10]),
        ({"strategy": "zero", "zero_stage": 3}, [8, 8]),
        ({"strategy": "master"}, [16, 8]),
        ({"optimizer": "sgd"}, [8, 8]),
        ({"optimizer": "lion"}, [12, 12]),
    ],
)
def test_two_ranks(options, of_each):
    config = Config(**options)
    found = on_ranks(2, lambda comm: memory_estimate.certain_bytes(100, config, Mesh(comm)))
    assert found == [100 * one for one in of_each]
