"""Common code of asynchronous strategies: local steps, waiting for messages, unsupported environments."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from tf_dist.comm.formatting import named
from tf_dist.comm.runtime.launch import patience_s
from tf_dist.comm.transport.base import Pending
from tf_dist.errors import LaunchError, RankLost, UsageError
from tf_dist.parallel.totals import TOKENS, GradientReplica, Totals, own_sum, scale_of
from tf_dist.strategies.base import Setting, option

# Polling interval of an idle rank.
LOOK_EVERY_S = 0.00005


def step_alone(terms: list[np.ndarray], totals: Totals, clip_norm: float, replica: GradientReplica) -> float:
    """Take an optimizer step with this rank's gradient.

    Args:
        terms: sums of the gradients of this rank's micro-batches, (P,) float32 each; they are overwritten.
        totals: of this rank.
        clip_norm: largest norm of the mean gradient; 0 for no clipping.
        replica: this rank's.

    Returns:
        The norm of the mean gradient before clipping.

    Raises:
        NumericError: on this rank: the gradient is not finite; no weight has changed.
    """
    counts = totals.sum()
    if not counts[TOKENS]:
        replica.skip()
        return 0.0
    gradient = own_sum(terms, replica.parameters)
    norm = replica.norm(gradient) / counts[TOKENS]
    replica.apply(gradient, scale_of(norm, counts, clip_norm))
    return float(norm)


@contextmanager
def unless_failed(peers: list[Any], peer: Any) -> Iterator[None]:
    """Communicate with a peer; if it has failed, remove it from ``peers`` and continue."""
    try:
        yield
    except RankLost:
        peers[:] = [other for other in peers if other is not peer]


def wait_for(messages: Sequence[Pending], rank: int) -> None:
    """Wait for messages to or from a rank, yielding the core to others meanwhile: MPI's own wait does not.

    Raises:
        LaunchError: on this rank: they take longer than `patience_s`.
    """
    wait_until(lambda: all(one.done() for one in messages), lambda: False, lambda: [rank])
    for one in messages:
        one.wait()


def wait_until(done: Callable[[], bool], look: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
    """Poll until a condition holds.

    Args:
        done: the condition.
        look: processes messages that have arrived; returns whether there were any.
        missing: the ranks that are waited for.

    Raises:
        LaunchError: on this rank: no message has arrived for `patience_s`.
    """
    heard, limit_s = time.monotonic(), patience_s()
    while not done():
        if look():
            heard = time.monotonic()
        elif time.monotonic() - heard > limit_s:
            raise LaunchError(
                f"nothing was heard of {named(missing())} for {limit_s:.0f} s. Is a rank stopped, or a "
                "link down?"
            )
        else:
            time.sleep(LOOK_EVERY_S)


def master_trains() -> Any:
    """The option of strategies with a server on rank 0."""
    text = "let the parameter server (rank 0) of downpour or easgd compute gradients too"
    return option("off", "Downpour", text, choices=("on", "off"))


def check_worker(strategy: object, setting: Setting) -> None:
    """Refuse ranks that partition a model, and a transport without point-to-point messages.

    Raises:
        UsageError: with an alternative.
    """
    if setting.shared:
        raise UsageError(
            f"strategy {strategy} with {setting.degrees}: a worker has the whole model, so it needs all "
            "ranks along the data axis. Use degrees of 1"
        )
    if setting.backend == "horovod":
        raise UsageError(f"backend horovod cannot carry strategy {strategy}: use backend mpi")
