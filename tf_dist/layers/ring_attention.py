"""Ring attention: context-parallel attention, in which keys and values travel around a ring of ranks.

Ring attention (Liu et al. 2023): every rank keeps its queries, and attends to the keys and values of one rank
after the other, while the next ones are in flight. Partial results are sums relative to the largest score so
far, and are rescaled when a larger one arrives (online softmax: Milakov & Gimelshein 2018; Rabe & Staats
2021). So no rank ever has all keys, and attention weights exist for one block of queries only. The backward
pass recomputes weights from the logarithm of their sum (Dao et al. 2022); the gradients of keys and values
travel with them, each rank adding its own, and return to their owner.

Legend: B rows, T tokens, s ranks, H heads, K width of a head, S queries of a block, N keys, L = T / s.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tf_dist.comm.transport.base import Comm
from tf_dist.layers.mappings import keep_order
from tf_dist.layers.ring_exchange import RingExchange
from tf_dist.models.attention import BLOCK, MASKED, attention, older
from tf_dist.parallel.context_partition import chunks, columns, seen


class PartialAttention(NamedTuple):
    """Partial attention of a block of queries, all float32.

    values: the weighted sum of values, (B, H, S, K). total: the sum of the weights, and largest: the score
    whose weight is 1, both (B, H, S, 1).
    """

    values: Any
    total: Any
    largest: Any


class RingAttention:
    """`tf_dist.models.attention.attention`, where each rank has its `context_partition.columns` of a row.

    Takes and returns (B, H, L, K); L must be known when the graph is traced. A collective.

    Args:
        comm: the ranks that partition rows, `Mesh.sequence`.
        block: S.
    """

    def __init__(self, comm: Comm, block: int = BLOCK) -> None:
        keep_order()
        self._ring, self._block = RingExchange(comm), block

    def __call__(
        self, q_BxHxLxK: tf.Tensor, k_BxHxLxK: tf.Tensor, v_BxHxLxK: tf.Tensor, window: int = 0
    ) -> Any:
        """Causal attention over the tokens of all ranks; ``window``: to so many at most, 0: to all."""
        if self._ring.size == 1:
            return attention(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK, window)

        @tf.custom_gradient  # type: ignore[untyped-decorator]
        def run(q: Any, k: Any, v: Any) -> Any:
            # Scaled first, for the reason given in `tf_dist.models.attention`.
            scale = q.shape[3] ** -0.5
            q = q * scale
            attended, logs = _forward(self._ring, self._places(q), q, k, v, window)
            attended = tf.cast(attended, v.dtype)

            def gradient(dattended: Any) -> Any:
                back = _Back(self._places(q), q, attended, logs, dattended)
                dq, dk, dv = _backward(self._ring, back, k, v, window)
                return dq * scale, dk, dv

            return attended, gradient

        return run(q_BxHxLxK, k_BxHxLxK, v_BxHxLxK)

    def _places(self, q: Any) -> list[slice]:
        """The blocks of queries; none spans both chunks of a rank."""
        early, late = chunks(q.shape[2] * self._ring.size, self._ring.size)
        cuts = [*range(0, early, self._block), *range(early, early + late, self._block), early + late]
        return [slice(*cut) for cut in itertools.pairwise(cuts)]


class _Turn(NamedTuple):
    """The keys and values currently on a rank, and which of its blocks of queries attend to which of them.

    pairs: block index, its queries, and its keys. masked: keys are the rank's own: a block attends to those
    up to its last query, with a causal mask among its queries. queries_at, keys_at: positions in a row.
    window: see `RingAttention`.
    """

    k: Any
    v: Any
    pairs: list[tuple[int, slice, slice]]
    masked: bool
    queries_at: np.ndarray
    keys_at: np.ndarray
    window: int

    def hidden(self, queries: slice, keys: slice) -> np.ndarray | None:
        """What is added to the scores of a block, (S, N); None: nothing."""
        hidden = older(self.queries_at[queries], self.keys_at[keys], self.window)
        if not self.masked:
            return hidden
        S, N = queries.stop - queries.start, keys.stop
        if hidden is not None:
            hidden[:, N - S :] += _future(S)
        return hidden


def _turn(ring: RingExchange, number: int, places: list[slice], k: Any, v: Any, window: int) -> _Turn:
    """Work of a rank in turn n, in which it has the keys of the n-th rank before it."""
    seq_len, source = k.shape[2] * ring.size, (ring.rank - number) % ring.size
    queries_at, keys_at = (columns(seq_len, rank, ring.size) for rank in (ring.rank, source))
    if number == 0:
        own = [(n, place, slice(0, place.stop)) for n, place in enumerate(places)]
        return _Turn(k, v, own, True, queries_at, keys_at, window)
    queries, keys = seen(seq_len, ring.rank, source, ring.size)
    inside = [queries.start <= place.start and place.stop <= queries.stop for place in places]
    pairs = [(n, place, keys) for n, place in enumerate(places) if inside[n]]
    return _Turn(k, v, pairs, False, queries_at, keys_at, window)


def _future(tokens: int) -> np.ndarray:
    """The causal mask among so many queries, (S, S)."""
    return np.triu(np.full((tokens, tokens), MASKED, np.float32), k=1)


# Forward -----------------------------------------------------------------------------------------


def _forward(ring: RingExchange, places: list[slice], q: Any, k: Any, v: Any, window: int) -> tuple[Any, Any]:
    """Attention output, (B, H, L, K), and logarithms of the sums of weights, (B, H, L, 1); float32."""
    done: list[PartialAttention] = []
    for number in range(ring.size):
        begun = None if number == ring.size - 1 else ring.begin([k, v], [q])
        _look(done, _turn(ring, number, places, k, v, window), q, [q if begun is None else begun])
        if begun is not None:
            k, v = ring.end(begun, [k, v], [one.values for one in done])
    values, totals, largest = zip(*done, strict=True)
    attended = tf.concat([value / total for value, total in zip(values, totals, strict=True)], axis=2)
    return attended, tf.math.log(tf.concat(totals, axis=2)) + tf.concat(largest, axis=2)


def _look(done: list[PartialAttention], turn: _Turn, q: Any, after: list[Any]) -> None:
    """Attend to the current keys, one block of queries after the other."""
    for n, queries, keys in turn.pairs:
        with tf.control_dependencies(after):  # one block at a time: they share memory
            hidden = turn.hidden(queries, keys)
            scores = _scores(q[:, :, queries], turn.k[:, :, keys], turn.masked, hidden)
            more = _attend(scores, turn.v[:, :, keys])
            if turn.masked:  # the first turn
                done.append(more)
            else:
                done[n] = _both(done[n], more)
            after = [done[n].values]


def _scores(q_BxHxSxK: tf.Tensor, k_BxHxNxK: tf.Tensor, masked: bool, hidden_SxN: np.ndarray | None) -> Any:
    """Of scaled queries, (B, H, S, N) float32.

    Args:
        q_BxHxSxK: queries.
        k_BxHxNxK: keys.
        masked: the queries are the last S of N tokens.
        hidden_SxN: the whole mask, where a window hides some as well.
    """
    scores = tf.cast(tf.matmul(q_BxHxSxK, k_BxHxNxK, transpose_b=True), tf.float32)
    if hidden_SxN is not None:
        return scores + tf.constant(hidden_SxN)
    if not masked:
        return scores
    S, N = q_BxHxSxK.shape[2], k_BxHxNxK.shape[2]
    future_SxS = tf.constant(_future(S))
    if N == S:
        return scores + future_SxS
    return tf.concat([scores[..., : N - S], scores[..., N - S :] + future_SxS], axis=-1)


def _attend(scores_BxHxSxN: tf.Tensor, v_BxHxNxK: tf.Tensor) -> PartialAttention:
    largest = tf.reduce_max(scores_BxHxSxN, -1, keepdims=True)
    weights = tf.exp(scores_BxHxSxN - largest)
    values = tf.matmul(tf.cast(weights, v_BxHxNxK.dtype), v_BxHxNxK)
    return PartialAttention(tf.cast(values, tf.float32), tf.reduce_sum(weights, -1, keepdims=True), largest)


def _both(a: PartialAttention, b: PartialAttention) -> PartialAttention:
    """Merge partial attention over two sets of keys, relative to the larger score."""
    largest = tf.maximum(a.largest, b.largest)
    of_a, of_b = tf.exp(a.largest - largest), tf.exp(b.largest - largest)
    return PartialAttention(a.values * of_a + b.values * of_b, a.total * of_a + b.total * of_b, largest)


# Backward ----------------------------------------------------------------------------------------


def _backward(ring: RingExchange, back: _Back, k: Any, v: Any, window: int) -> tuple[Any, Any, Any]:
    """The gradients of the scaled queries, of the keys and of the values.

    Gradients of keys and values follow their keys and values one turn later, so that the sum of the previous
    ranks is in flight while this rank computes its part. The part of a rank's own queries is not sent.
    """
    dtype = k.dtype
    own: list[Any] = []
    sums: list[Any] = []
    for number in range(ring.size):
        block = [] if number == ring.size - 1 else [k, v]
        given = block + sums  # keys of this turn, and gradients of the keys of the turn before
        # The first keys are available since the forward pass: without `dattended` they would be sent too
        # early.
        begun = ring.begin(given, [back.dattended]) if given else None
        after = [back.dattended if begun is None else begun]
        part = _look_back(back, _turn(ring, number, back.places, k, v, window), after)
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
    """Gradients of a rank's queries, and the saved values of the forward pass that they need.

    dqs: of each block of queries, the sum so far, float32.
    """

    def __init__(self, places: list[slice], q: Any, attended: Any, logs: Any, dattended: Any) -> None:
        self.places, self.q, self.logs, self.dattended = places, q, logs, dattended
        # Softmax's gradient needs the mean of the weights' gradients under the weights: as in
        # `tf_dist.models.attention`, but over the keys of all ranks.
        product = tf.cast(dattended, tf.float32) * tf.cast(attended, tf.float32)
        self.means = tf.reduce_sum(product, -1, keepdims=True)
        self.dqs: list[Any] = [None] * len(places)

    def of_block(self, turn: _Turn, number: int, queries: slice, keys: slice) -> list[Any]:
        """Add to the gradient of a block of queries; return those of its keys and values, float32."""
        q, dattended = self.q[:, :, queries], self.dattended[:, :, queries]
        k, v = turn.k[:, :, keys], turn.v[:, :, keys]
        scores = _scores(q, k, turn.masked, turn.hidden(queries, keys))
        weights = tf.exp(scores - self.logs[:, :, queries])
        dweights = tf.cast(tf.matmul(dattended, v, transpose_b=True), tf.float32)
        dscores = tf.cast((dweights - self.means[:, :, queries]) * weights, q.dtype)
        dq, so_far = tf.cast(tf.matmul(dscores, k), tf.float32), self.dqs[number]
        self.dqs[number] = dq if so_far is None else so_far + dq
        dk = tf.matmul(dscores, q, transpose_a=True)
        dv = tf.matmul(tf.cast(weights, q.dtype), dattended, transpose_a=True)
        return [tf.cast(dk, tf.float32), tf.cast(dv, tf.float32)]


def _look_back(back: _Back, turn: _Turn, after: list[Any]) -> list[Any]:
    """The gradients of the current keys and values from this rank's queries.

    From the last block of queries on: where it has more keys than the one before it, theirs are complete.
    """
    sums: list[Any] = []
    complete: list[list[Any]] = []
    for n, queries, keys in reversed(turn.pairs):
        with tf.control_dependencies(after):  # one block at a time: they share memory
            more = back.of_block(turn, n, queries, keys)
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
