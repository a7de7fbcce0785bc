"""Attention over rows whose tokens several ranks share: keys and values travel round a ring of them.

Ring attention (Liu et al. 2023): every rank keeps its queries, and looks at the keys and values of one rank
after the other, while those of the next are on their way. What it has attended to so far is a sum under the
largest score so far, which is set right when a larger one comes (online softmax: Milakov & Gimelshein 2018;
Rabe & Staats 2021). So nobody ever has the keys of all, and weights only of a block of queries. The way back
computes weights again from the logarithm of their sum (Dao et al. 2022); the gradients of keys and values
travel with them, each rank adding its own, and come home.

Legend: B rows, T tokens, s ranks, H heads, K width of a head, S queries of a block, N keys, L = T / s.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_dist.comm.base import Comm
from tf_dist.layers.collectives import keep_order
from tf_dist.layers.passing import Ring
from tf_dist.models.attention import BLOCK, MASKED, attention
from tf_dist.parallel.sequence import chunks, seen


class Attended(NamedTuple):
    """What a block of queries has attended to so far, all float32.

    values: the sum of values under their weights, (B, H, S, K). total: the sum of the weights, and largest:
    the score whose weight is 1, both (B, H, S, 1).
    """

    values: Any
    total: Any
    largest: Any


class RingAttention:
    """`tf_dist.models.attention.attention`, each rank with its `tf_dist.parallel.sequence.columns` of a row.

    Takes and returns (B, H, L, K); L must be known when the graph is made. All ranks call it together.

    Args:
        comm: the ranks that share rows, `Mesh.sequence`.
        block: S.
    """

    def __init__(self, comm: Comm, block: int = BLOCK) -> None:
        keep_order()
        self._ring, self._block = Ring(comm), block

    def __call__(self, q_BxHxLxK: Any, k_BxHxLxK: Any, v_BxHxLxK: Any) -> Any:
        """Every token's mean of the values of itself and those before it, on whichever rank they are."""
        if self._ring.size == 1:
            return attention(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def run(q: Any, k: Any, v: Any) -> Any:
            # Scaled first, for the reason given in `tf_dist.models.attention`.
            scale = q.shape[3] ** -0.5
            q = q * scale
            attended, logs = _forward(self._ring, self._places(q), q, k, v)
            attended = tf.cast(attended, v.dtype)

            def gradient(dattended: Any) -> Any:
                back = _Back(self._places(q), q, attended, logs, dattended)
                dq, dk, dv = _backward(self._ring, back, k, v)
                return dq * scale, dk, dv

            return attended, gradient

        return run(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK)

    def _places(self, q: Any) -> list[slice]:
        """The blocks of queries; none has tokens of both chunks of a rank."""
        early, late = chunks(q.shape[2] * self._ring.size, self._ring.size)
        cuts = [*range(0, early, self._block), *range(early, early + late, self._block), early + late]
        return [slice(*cut) for cut in itertools.pairwise(cuts)]


class _Turn(NamedTuple):
    """The keys and values that are on a rank, and which of its blocks of queries look at which of them.

    pairs: the numbers of the blocks, their queries, and their keys. masked: keys are the rank's own: a block
    looks at those up to its last query, and its queries among themselves have a future.
    """

    k: Any
    v: Any
    pairs: list[tuple[int, slice, slice]]
    masked: bool


def _turn(ring: Ring, number: int, places: list[slice], k: Any, v: Any) -> _Turn:
    """What a rank does in a turn: in turn n it has the keys of the n-th rank before it."""
    if number == 0:
        return _Turn(k, v, [(n, place, slice(0, place.stop)) for n, place in enumerate(places)], True)
    queries, keys = seen(k.shape[2] * ring.size, ring.rank, (ring.rank - number) % ring.size, ring.size)
    inside = [queries.start <= place.start and place.stop <= queries.stop for place in places]
    return _Turn(k, v, [(n, place, keys) for n, place in enumerate(places) if inside[n]], False)


# Forward -----------------------------------------------------------------------------------------


def _forward(ring: Ring, places: list[slice], q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """What is attended to, (B, H, L, K), and the logarithms of the sums of weights, (B, H, L, 1); float32."""
    done: list[Attended] = []
    for number in range(ring.size):
        begun = None if number == ring.size - 1 else ring.begin([k, v], [q])
        _look(done, _turn(ring, number, places, k, v), q, [q if begun is None else begun])
        if begun is not None:
            k, v = ring.end(begun, [k, v], [one.values for one in done])
    values, totals, largest = zip(*done, strict=True)
    attended = tf.concat([value / total for value, total in zip(values, totals, strict=True)], axis=2)
    return attended, tf.math.log(tf.concat(totals, axis=2)) + tf.concat(largest, axis=2)


def _look(done: list[Attended], turn: _Turn, q: Any, after: list[Any]) -> None:
    """Let the queries look at the keys that are here, one block of queries after the other."""
    for n, queries, keys in turn.pairs:
        with tf.control_dependencies(after):  # one block at a time: they share the memory
            scores = _scores(q[:, :, queries], turn.k[:, :, keys], turn.masked)
            more = _attend(scores, turn.v[:, :, keys])
            if turn.masked:  # the first turn
                done.append(more)
            else:
                done[n] = _both(done[n], more)
            after = [done[n].values]


def _scores(q_BxHxSxK: Any, k_BxHxNxK: Any, masked: bool) -> Any:
    """Of scaled queries, (B, H, S, N) float32; masked: the queries are the last S of N tokens."""
    scores = tf.cast(tf.matmul(q_BxHxSxK, k_BxHxNxK, transpose_b=True), tf.float32)
    if not masked:
        return scores
    S, N = q_BxHxSxK.shape[2], k_BxHxNxK.shape[2]
    future_SxS = tf.constant(np.triu(np.full((S, S), MASKED, np.float32), k=1))
    if N == S:
        return scores + future_SxS
    return tf.concat([scores[..., : N - S], scores[..., N - S :] + future_SxS], axis=-1)


def _attend(scores_BxHxSxN: Any, v_BxHxNxK: Any) -> Attended:
    largest = tf.reduce_max(scores_BxHxSxN, -1, keepdims=True)
    weights = tf.exp(scores_BxHxSxN - largest)
    values = tf.matmul(tf.cast(weights, v_BxHxNxK.dtype), v_BxHxNxK)
    return Attended(tf.cast(values, tf.float32), tf.reduce_sum(weights, -1, keepdims=True), largest)


def _both(a: Attended, b: Attended) -> Attended:
    """The keys of both, under the larger of both scores."""
    largest = tf.maximum(a.largest, b.largest)
    of_a, of_b = tf.exp(a.largest - largest), tf.exp(b.largest - largest)
    return Attended(a.values * of_a + b.values * of_b, a.total * of_a + b.total * of_b, largest)


# Backward ----------------------------------------------------------------------------------------


def _backward(ring: Ring, back: _Back, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """The gradients of the scaled queries, of the keys and of the values.

    Those of keys and values follow their keys and values one turn behind, so that the sum of the ranks before
    is on its way while this rank computes its part. What a rank's own queries add stays at home.
    """
    dtype = k.dtype
    own: list[Any] = []
    sums: list[Any] = []
    for number in range(ring.size):
        block = [] if number == ring.size - 1 else [k, v]
        given = block + sums  # keys of this turn, and gradients of the keys of the turn before
        # The first keys have been here since the way forward: without `dattended` they would leave too early.
        begun = ring.begin(given, [back.dattended]) if given else None
        after = [back.dattended if begun is None else begun]
        part = _look_back(back, _turn(ring, number, back.places, k, v), after)
        arrived = [] if begun is None else ring.end(begun, given, part)
        k, v = arrived[:2] if block else (k, v)
        if number == 0:
            own = part
        else:
            so_far = arrived[len(block) :]
            sums = [a + b for a, b in zip(so_far, part, strict=True)] if so_far else part
    home = ring.end(ring.begin(sums, []), sums, [])
    dk, dv = (tf.cast(a + b, dtype) for a, b in zip(own, home, strict=True))
    return tf.cast(tf.concat(back.dqs, axis=2), dtype), dk, dv


class _Back:
    """The gradients of what a rank's queries attended to, and what they need of the way forward.

    dqs: of each block of queries, the sum so far, float32.
    """

    def __init__(self, places: list[slice], q: Any, attended: Any, logs: Any, dattended: Any) -> None:
        self.places, self.q, self.logs, self.dattended = places, q, logs, dattended
        # Softmax's gradient needs the mean of the weights' gradients under the weights: as in
        # `tf_dist.models.attention`, but over the keys of all ranks.
        product = tf.cast(dattended, tf.float32) * tf.cast(attended, tf.float32)
        self.means = tf.reduce_sum(product, -1, keepdims=True)
        self.dqs: list[Any] = [None] * len(places)

    def of_block(self, number: int, queries: slice, k: Any, v: Any, masked: bool) -> list[Any]:
        """Add to the gradient of a block of queries; those of the keys and values it looked at, float32."""
        q, dattended = self.q[:, :, queries], self.dattended[:, :, queries]
        weights = tf.exp(_scores(q, k, masked) - self.logs[:, :, queries])
        dweights = tf.cast(tf.matmul(dattended, v, transpose_b=True), tf.float32)
        dscores = tf.cast((dweights - self.means[:, :, queries]) * weights, q.dtype)
        dq, so_far = tf.cast(tf.matmul(dscores, k), tf.float32), self.dqs[number]
        self.dqs[number] = dq if so_far is None else so_far + dq
        dk = tf.matmul(dscores, q, transpose_a=True)
        dv = tf.matmul(tf.cast(weights, q.dtype), dattended, transpose_a=True)
        return [tf.cast(dk, tf.float32), tf.cast(dv, tf.float32)]


def _look_back(back: _Back, turn: _Turn, after: list[Any]) -> list[Any]:
    """The gradients of the keys and values that are here, as far as this rank's queries looked at them.

    From the last block of queries on: where it saw more keys than the one before it, theirs are complete.
    """
    sums: list[Any] = []
    complete: list[list[Any]] = []
    for n, queries, keys in reversed(turn.pairs):
        with tf.control_dependencies(after):  # one block at a time: they share the memory
            more = back.of_block(n, queries, turn.k[:, :, keys], turn.v[:, :, keys], turn.masked)
            if sums and sums[0].shape[2] > keys.stop:
                complete.append([one[:, :, keys.stop :] for one in sums])
                sums = [one[:, :, : keys.stop] for one in sums]
            sums = [a + b for a, b in zip(sums, more, strict=True)] if sums else more
            after = [*sums, back.dqs[n]]
    if not sums:
        return [tf.zeros_like(one, tf.float32) for one in (turn.k, turn.v)]
    stretches = [sums, *reversed(complete)]
    whole = [tf.concat([stretch[i] for stretch in stretches], axis=2) for i in (0, 1)]
    missing = turn.k.shape[2] - whole[0].shape[2]
    return [tf.pad(one, ((0, 0), (0, 0), (0, missing), (0, 0))) for one in whole] if missing else whole
