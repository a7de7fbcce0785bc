"""Every strategy against what it claims of itself (`Traits`), and one that is written here.

``survives_failures`` is shown by killed ranks, in tests/jobs/test_deaths.py; here only who asks is seen.
"""

import time

import numpy as np
import pytest
from mpi4py import MPI
from test_training_mpi import HELD_OUT, TOKENS, flat, steps_of, trainer

from tf_dist import faults
from tf_dist.errors import LaunchError, NumericError
from tf_dist.parallel.totals import TOKENS as COUNT
from tf_dist.parallel.totals import clipping, own_sum
from tf_dist.strategies import (
    EASGD,
    STRATEGIES,
    AllReduce,
    BFloat16,
    Compressed,
    DiLoCo,
    Downpour,
    Gossip,
    LocalSGD,
    ParameterServer,
    PowerSGD,
    Strategy,
    TopK,
    Traits,
    Zero,
)

N = MPI.COMM_WORLD.size
# Every strategy has ranks that differ at 2, and an odd one at 3.
pytestmark = pytest.mark.ranks(3)
several = pytest.mark.skipif(N == 1, reason="one rank agrees with itself")


class SignVote(Strategy):
    """signSGD with majority vote (Bernstein et al. 2019): a strategy of a user, in one file."""

    traits = Traits(atomic_step=True)

    def step(self, request):
        """Each rank votes by the signs of its gradient; all step by the majority's."""
        gradient = own_sum(request.gradients(), request.replica.parameters)
        counts = request.totals.reduce(request.mesh.all)
        votes = np.where(np.isfinite(gradient), np.sign(gradient), np.nan).astype(np.float32)
        request.mesh.all.allreduce(votes)
        norm = request.replica.norm(votes) / max(counts[COUNT], 1.0)
        if np.isfinite(norm):
            length = request.replica.norm(np.sign(votes))
            request.replica.apply(np.sign(votes), clipping(length, request.clip_norm))
        return norm


MADE = {
    "allreduce": AllReduce,
    "master": ParameterServer,
    "zero 1": Zero,
    "zero 2": lambda: Zero(stage=2),
    "zero 3": lambda: Zero(stage=3),
    "local-sgd": lambda: LocalSGD(sync_every=3),
    "local-sgd, synchronous first": lambda: LocalSGD(sync_every=3, sync_warmup_steps=2),
    "diloco": lambda: DiLoCo(sync_every=3),
    "diloco, delayed": lambda: DiLoCo(sync_every=4, outer_delay=2),
    "downpour": Downpour,
    "downpour, no staleness": lambda: Downpour(staleness=0),
    "easgd": lambda: EASGD(sync_every=2),
    "gossip": Gossip,
    "bf16": lambda: Compressed(AllReduce(), BFloat16()),
    "topk, whole first": lambda: Compressed(AllReduce(), TopK(density=0.1), start=2),
    "powersgd": lambda: Compressed(AllReduce(), PowerSGD(rank=1, least_rate=1.5)),
    "diloco, powersgd": lambda: Compressed(DiLoCo(sync_every=3), PowerSGD(rank=1, least_rate=1.5)),
    "a user's": SignVote,
}
every_strategy = pytest.mark.parametrize("name", MADE)


def claimed(**traits):
    """The strategies that claim all of this."""
    return [
        name
        for name, make in MADE.items()
        if all(getattr(make().traits, trait) == value for trait, value in traits.items())
    ]


@pytest.fixture(scope="module")
def trained_by(connected):
    """The trainer of each strategy: one for all tests, for to trace a model takes longer than all steps."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = trainer(connected, MADE[name](), autotune="off")
        made[name].synchronize()
        return made[name]

    return of


def together(trained, count=1):
    """Steps before which all have met, and after which all meet."""
    trained.last_step = trained.step + count
    return steps_of(trained, count)


def targets(trained, count):
    """Target tokens of the next steps, of all ranks."""
    sequences = trained.sequences(TOKENS)
    sampler = trained.sampler(sequences)
    batches = [sampler.batch(trained.step + ahead) for ahead in range(count)]
    return sum(int((sequences.rows(batch)[1] >= 0).sum()) for batch in batches)


def test_every_name_is_here():
    assert {one.name for make in MADE.values() if (one := make()).name} >= set(STRATEGIES)


@every_strategy
def test_all_meet_and_validate_alike(connected, everyone, trained_by, name):
    trained = trained_by(name)
    before = everyone(trained.validate(HELD_OUT)["val_loss"])
    together(trained, 4)
    after, sha = everyone(trained.validate(HELD_OUT)["val_loss"]), everyone(trained.check_equal())
    assert len(set(before)) == len(set(after)) == len(set(sha)) == 1 and after[0] != before[0]
    assert trained.strategy.in_sync and len(set(everyone(trained.step))) == 1


@pytest.mark.parametrize("name", claimed(replicas_equal=True))
def test_replicas_equal(connected, everyone, trained_by, name):
    """By the bits of what every rank holds, after every step; of stage 3 a rank holds no whole weight."""
    trained = trained_by(name)
    for _ in range(4):
        together(trained)
        if trained.strategy.traits.sharding < 3:
            assert len(set(everyone(flat(trained.model).tobytes()))) == 1
        assert trained.strategy.in_sync


@several
@pytest.mark.parametrize("name", claimed(replicas_equal=False, lockstep=True))
def test_replicas_that_are_not_said_to_be_equal(connected, everyone, trained_by, name):
    trained = trained_by(name)
    found = []
    for _ in range(4):
        together(trained)
        found.append(len(set(everyone(flat(trained.model).tobytes()))) == 1)
        assert trained.strategy.in_sync or not found[-1]
    assert not all(found), "it could claim more"


@pytest.mark.parametrize("name", claimed(global_losses=True))
def test_global_losses(connected, everyone, trained_by, name):
    trained = trained_by(name)
    before, expected = trained.tokens, targets(trained, 3)
    for _ in range(3):
        one = targets(trained, 1)
        [logs] = together(trained)
        assert everyone(logs) == [everyone(logs)[0]] * N and logs["tokens"] == one
    assert everyone(trained.tokens - before) == [expected] * N


@pytest.mark.parametrize("name", claimed(global_losses=False))
def test_losses_of_each_rank_add_up_when_all_meet(connected, everyone, trained_by, name):
    trained = trained_by(name)
    before, expected = trained.tokens, targets(trained, 4)
    together(trained, 4)
    trained.synchronize()
    assert everyone(trained.tokens - before) == [expected] * N
    assert everyone(trained.of_all({"rank": float(connected.rank)}))[0] in (
        {"rank": 0.0},
        {"rank": N * (N - 1) / 2},
    )


@several
@pytest.mark.parametrize("name", claimed(lockstep=True))
def test_lockstep(connected, everyone, trained_by, name):
    """Nobody ends a step before the slowest rank has its gradients; and all have made as many collectives."""
    trained = trained_by(name)
    together(trained)
    train, computed = trained.runner.forward_backward, []

    def slowly(*arguments):
        train(*arguments)
        time.sleep(0.1 if connected.rank == N - 1 else 0.0)
        computed.append(time.monotonic())  # of one clock on a node

    trained.runner.forward_backward = slowly
    together(trained)
    ended, trained.runner.forward_backward = time.monotonic(), train
    assert min(everyone(ended)) >= max(everyone(computed[-1]))


@several
@every_strategy
def test_who_steps(connected, everyone, trained_by, name):
    """The optimizer on all ranks, of all or a shard of the weights; or on rank 0 alone."""
    trained = trained_by(name)
    traits, applied = trained.strategy.traits, []
    apply = trained.replica.apply
    trained.replica.apply = lambda gradient, scale: (applied.append(gradient.size), apply(gradient, scale))[1]
    together(trained, 3)
    shard, trained.replica.apply = trained.replica.own_shard, apply
    assert (shard is not None) == (traits.sharding > 0)
    steps = everyone(len(applied))
    if traits.optimizer_on_root:
        assert steps[0] >= 3 and steps[1:] == [0] * (N - 1)
    elif traits.lockstep:
        assert steps == [3] * N
    if traits.sharding:
        assert sum(everyone(shard.stop - shard.start)) == trained.replica.layout.total


def state_of(trained):
    """All that this rank holds of weights, optimizer and strategy, as bytes."""
    pieces = [piece for entry in trained.whole().entries for piece in entry.pieces]
    return b"".join(np.ascontiguousarray(piece.read()).tobytes() for piece in pieces)


@several
@pytest.mark.parametrize("name", claimed(lockstep=True))
def test_overlaps(connected, everyone, trained_by, name):
    """What cannot let gradients leave early refuses; what can does so."""
    traits = MADE[name]().traits
    if traits.overlaps:
        trained = trainer(connected, MADE[name](), autotune="off", overlap="on", allreduce="messages")
        assert "gradients leave during the backward pass" in trained.runner.said
        together(trained, 2)
        assert len(set(everyone(trained.check_equal()))) == 1
    elif traits.sharding < 2:  # the others have ways of their own
        with pytest.raises(LaunchError, match="needs all of them at once"):
            trainer(connected, MADE[name](), autotune="off", overlap="on", allreduce="messages")


@every_strategy
def test_who_can_finish_without_the_dead(connected, trained_by, name):
    trained = trained_by(name)
    assert trained.in_place.can == (connected.survives and trained.strategy.traits.survives_failures)


@pytest.mark.parametrize("name", claimed(lockstep=True))
def test_atomic_step(connected, everyone, trained_by, name):
    """NaN on the last rank: a step that is skipped changes nothing on any rank; else all end at once.

    The last test of each trainer.
    """
    trained = trained_by(name)
    together(trained)
    before = state_of(trained)
    faults.arm(f"nan:rank={N - 1},step={trained.step + 1},times=1", connected.rank)
    if trained.strategy.traits.atomic_step:
        [logs] = together(trained)
        assert not np.isfinite(logs["grad_norm"]) and trained.state.counters[2:] == [1, 1]
        outcome = "skipped"
    else:
        with pytest.raises(NumericError):
            together(trained)
        outcome = "ended"
    faults.arm("", 0)
    assert everyone(outcome) == [outcome] * N
    assert all(everyone(state_of(trained) == before)), "a weight, or the optimizer, has changed"


def test_a_strategy_of_a_user_trains(connected, everyone):
    trained = trainer(connected, SignVote(), autotune="off", rate=3e-3)
    before = trained.validate(HELD_OUT)["val_loss"]
    history = trained.fit(TOKENS[:200] % 5, steps=60, validation=TOKENS[200:260] % 5, eval_every=30)
    assert history["val_loss"][-1] < before - 0.5
    assert len(set(everyone(trained.check_equal()))) == 1


def test_a_strategy_of_a_user_by_name(connected):
    """What ``--strategy module:Class`` asks for; by the flag: tests/jobs/test_own_strategy.py."""
    trained = trainer(connected, "test_strategy_contract_mpi:SignVote", autotune="off")
    assert type(trained.strategy).__name__ == "SignVote"
    together(trained, 2)
    trained.check_equal()
