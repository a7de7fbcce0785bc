"""`decode`: continuations of many prompts, in batches, on one rank or shared among data-parallel ranks.

Legend: B rows at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tf_dist.comm.transport.base import Comm, SerialComm
from tf_dist.decoding.beam_search import BeamSearch, beam_search
from tf_dist.decoding.decoded import Decoded
from tf_dist.decoding.forward import CachedForward
from tf_dist.decoding.rows import DecodedRows
from tf_dist.decoding.sampling import Sampling, choose, log_softmax
from tf_dist.errors import UsageError
from tf_dist.partition import share

Prompts = Sequence[Sequence[int] | np.ndarray]
ENDED = -1


def decode(
    forward: CachedForward,
    prompts: Prompts,
    strategy: Sampling | BeamSearch,
    count: int,
    end: int | None = None,
    batch: int = 8,
    comm: Comm | None = None,
) -> list[Decoded]:
    """Continue each prompt; a row's result does not depend on the others, nor on batch and ranks.

    (But for the last bits of logits, which may depend on the number of rows of a matrix product.)

    Args:
        forward: the model; a collective of the ranks that share it.
        prompts: token ids, at least one each; of any lengths.
        strategy: greedy is ``Sampling(temperature=0)``.
        count: tokens of a continuation, at most.
        end: the token that ends a text; None: each continuation has ``count`` tokens.
        batch: rows at once; with beams each is ``beams`` rows of the model.
        comm: data-parallel ranks, all of which have the prompts, and get all results; each decodes its
            share, a collective. None: this rank alone.

    Returns:
        In the order of the prompts.

    Raises:
        UsageError: a prompt is empty; count or batch are less than 1.
    """
    ranks = comm or SerialComm()
    if forward.lockstep or ranks.size == 1:
        return list(decode_in_order(forward, prompts, strategy, count, end, batch))
    own = share(len(prompts), ranks.rank, ranks.size)
    made = [list(one) for one in decode_in_order(forward, prompts, strategy, count, end, batch, own)]
    everyone = ranks.allgather_obj(made, what="decoded rows")
    return [Decoded(tuple(ids), *rest) for part in everyone for ids, *rest in part]


def decode_in_order(
    forward: CachedForward,
    prompts: Prompts,
    strategy: Sampling | BeamSearch,
    count: int,
    end: int | None = None,
    batch: int = 8,
    rows: range | None = None,
) -> Iterator[Decoded]:
    """Yield what `decode` returns, batch by batch, for some of the rows.

    Args:
        forward: as in `decode`.
        prompts: all of them.
        strategy: as in `decode`.
        count: as in `decode`.
        end: as in `decode`.
        batch: as in `decode`.
        rows: numbers of the prompts that are continued here; None: all.

    Raises:
        UsageError: as in `decode`.
    """
    if count < 1 or batch < 1:
        raise UsageError(f"at least one token and one row at once are needed, not {count} and {batch}")
    own = range(len(prompts)) if rows is None else rows
    for first in range(own.start, own.stop, batch):
        numbers = range(first, min(own.stop, first + batch))
        # The last batch is filled up: a compiled function, and the bits of its products, are of one shape.
        filled = [*numbers, *[first] * (min(batch, len(prompts)) - len(numbers))]
        given = [prompts[number] for number in filled]
        if isinstance(strategy, BeamSearch):
            made = beam_search(forward, given, strategy, count, end)
        else:
            made = _sampled(forward, given, filled, strategy, count, end)
        yield from made[: len(numbers)]


def sample(
    forward: CachedForward,
    prompts: Prompts,
    sampling: Sampling,
    count: int,
    end: int | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the next token of each row, up to ``count`` times, and its log probability; (B,) each.

    Args:
        forward: the model.
        prompts: token ids, at least one each.
        sampling: how tokens are chosen.
        count: how many of each row, at most.
        end: the token that ends a row: it is yielded, and after it `ENDED`.
        numbers: of the rows, for `Sampling.generator`; None: 0, 1, ...

    Raises:
        UsageError: a prompt is empty.
    """
    rows = DecodedRows(forward, prompts, count)
    randoms = [sampling.generator(number) for number in numbers or range(len(prompts))]
    going_B = np.ones(len(prompts), bool)
    for made in range(1, count + 1):
        log_BxV = log_softmax(rows.logits_BxV)
        new_B, log_B = np.full(len(prompts), ENDED), np.zeros(len(prompts))
        for row in np.flatnonzero(going_B):
            new_B[row] = choose(rows.logits_BxV[row], sampling, randoms[row])
            log_B[row] = log_BxV[row, new_B[row]]
        yield new_B, log_B
        going_B = going_B & (new_B != (ENDED if end is None else end))
        if not going_B.any():
            return
        if made < count:
            rows.append(new_B, going_B)


def _sampled(
    forward: CachedForward,
    prompts: Prompts,
    numbers: Sequence[int],
    sampling: Sampling,
    count: int,
    end: int | None,
) -> list[Decoded]:
    steps = list(sample(forward, prompts, sampling, count, end, numbers))
    ids_BxS = np.stack([new_B for new_B, _ in steps], axis=1)
    log_B = np.stack([one for _, one in steps], axis=1).sum(axis=1)
    found = []
    for ids_S, log_probability in zip(ids_BxS, log_B, strict=True):
        ended = end is not None and end in ids_S
        ids = [int(i) for i in ids_S if i not in (ENDED, end)]
        found.append(Decoded(tuple(ids), float(log_probability), float(log_probability), ended))
    return found
