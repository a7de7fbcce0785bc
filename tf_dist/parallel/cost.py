"""What each way of dividing work among ranks costs, by formula: bytes sent, bytes held, time idle.

For plans and for benchmarks, which print what was counted beside these. Sources are named where a formula
is somebody's; docs/parallelism.md derives them in words. Nothing here is measured.

Legend: P parameters, N ranks that do the same, S = 4 P bytes of a gradient, B rows of a micro-batch, T
tokens, D width, H heads, V vocabulary, L layers, m micro-batches of a rank in a step, p ranks of a pipeline
with v stages each, t ranks that share layers, s ranks that share rows.
"""

from __future__ import annotations

from typing import NamedTuple

# Of weights, gradients, sums and optimizer state. What a model computes in may be shorter.
FLOAT32 = 4

# Bytes that a rank sends in a step ----------------------------------------------------------------


def allreduce_bytes(size: float, ranks: int) -> float:
    """Bytes that each rank sends to sum ``size`` bytes everywhere: 2 (N - 1) / N of them.

    The least that is possible; ring and Rabenseifner's algorithm send as many (Thakur et al. 2005).
    """
    return 2 * (ranks - 1) / ranks * size


def tree_sum_bytes(parameters: int, ranks: int, terms: int = 1) -> float:
    """The same in the order of the tree, by messages (docs/exactness.md): (k + 1) (N - 1) / N S.

    Args:
        parameters: P.
        ranks: N.
        terms: k, how many subtrees this rank has; 1 where N is a power of two that divides the micro-batches.
    """
    return (terms + 1) * (ranks - 1) / ranks * FLOAT32 * parameters


def zero_bytes(parameters: float, ranks: int, stage: int, micro_batches: int = 1) -> float:
    """Bytes that each rank sends by messages, with ZeRO (Rajbhandari et al. 2020, section 7).

    Stage 1: a reduce-scatter of the sum and an allgather of the weights, together one allreduce. Stage 2: the
    gradient of each micro-batch leaves for its owners, and weights are gathered once. Stage 3: for each
    micro-batch weights are gathered on the way forward and once more on the way back. The paper's 2 P and 3 P
    elements are those of one micro-batch.

    Args:
        parameters: P.
        ranks: N, along data.
        stage: 1, 2 or 3.
        micro_batches: m.
    """
    passes = {1: 2, 2: micro_batches + 1, 3: 3 * micro_batches}[stage]
    return passes * (ranks - 1) / ranks * FLOAT32 * parameters


def tensor_bytes(
    rows: int, seq_len: int, width: int, layers: float, ranks: int, micro_batches: int = 1
) -> float:
    """Bytes that each rank sends where t ranks share the layers of a Transformer.

    Each layer sums (B, T, D) four times, after attention and after the feed-forward network on the way
    forward, before them on the way back: 8 B T D (t - 1) / t numbers (Narayanan et al. 2021b, section 3.2).
    A divided vocabulary sums (B, T, D) twice more, and gives away 4 numbers for each token in the loss.
    """
    token = 2 * (4 * layers + 2) * width * (ranks - 1) / ranks + 4 * (ranks - 1)
    return micro_batches * rows * seq_len * token * FLOAT32


def pipeline_bytes(
    rows: int,
    seq_len: int,
    width: int,
    ranks: int,
    rank: int,
    micro_batches: int,
    virtual_stages: int = 1,
    itemsize: int = FLOAT32,
) -> int:
    """Bytes that one rank of a pipeline sends: (B, T, D) forward and its gradient backward, from each stage.

    The first stage sends nothing back and the last one nothing forward. With v stages on a rank it is v times
    as much (Narayanan et al. 2021b, section 2.2).

    Args:
        rows: B.
        seq_len: T.
        width: D.
        ranks: p.
        rank: 0 <= rank < p.
        micro_batches: m.
        virtual_stages: v.
        itemsize: bytes of a number that the model computes with.
    """
    if ranks == 1:
        return 0
    boundaries = 2 * virtual_stages - (rank == 0) - (rank == ranks - 1)
    return micro_batches * boundaries * rows * seq_len * width * itemsize


def ring_bytes(
    rows: int,
    seq_len: int,
    width: int,
    layers: int,
    ranks: int,
    micro_batches: int = 1,
    itemsize: int = FLOAT32,
) -> int:
    """Bytes that each rank sends where s ranks share rows (`tf_dist.layers.ring`).

    In every layer keys and values, (B, T / s, D) each, go s - 1 times to the next rank on the way forward
    (Liu et al. 2023); on the way back they do so once more, and their gradients, in float32, with them.

    Args:
        rows: B.
        seq_len: T.
        width: D, of the heads that this rank has.
        layers: L.
        ranks: s.
        micro_batches: m.
        itemsize: bytes of a number that the model computes with.
    """
    block = rows * (seq_len // ranks) * width
    return micro_batches * layers * (ranks - 1) * block * (4 * itemsize + 2 * FLOAT32)


# Bytes that a rank holds --------------------------------------------------------------------------


def state_bytes(parameters: float, ranks: int = 1, stage: int = 0, slots: int = 2) -> float:
    """Weights, gradient and optimizer state of a rank, in float32.

    With Adam's two moments 16 P; 8 + 8 / N, 4 + 12 / N and 16 / N bytes for each parameter in the stages of
    ZeRO (the arithmetic of Rajbhandari et al. 2020, figure 1, for float32 instead of mixed precision).

    Args:
        parameters: P, of this rank: where t x p ranks share a model about 1 / (t p) of all.
        ranks: N, along data.
        stage: of ZeRO; 0: every rank has everything.
        slots: arrays as large as the weights that the optimizer keeps.
    """
    divided = (slots if stage >= 1 else 0) + (stage >= 2) + (stage >= 3)
    return FLOAT32 * parameters * (slots + 2 - divided + divided / ranks)


def activation_bytes(
    rows: int,
    seq_len: int,
    layers: float,
    width: int,
    heads: int,
    vocabulary: int,
    *,
    tensor: int = 1,
    sequence: int = 1,
    weights_kept: bool = True,
) -> float:
    """What one micro-batch leaves for the way back in a Transformer of this project, float32, no dropout.

    For each token and layer, after Korthikanti et al. (2022): the inputs of both norms and of what follows
    them, 4 D, which ranks that share a layer all have; queries, keys and values, what was attended to, and
    both sides of the GELU, 12 D, which they divide; and attention's weights, H T. Then 2 D, and three times
    the logits.

    Args:
        rows: B.
        seq_len: T.
        layers: L, of this rank.
        width: D.
        heads: H.
        vocabulary: V; 0 on ranks of a pipeline without the last stage.
        tensor: t.
        sequence: s.
        weights_kept: whether attention's weights are kept; in blocks (`tf_dist.models.attention`) and in a
            ring they are not.
    """
    layer = 4 * width + (12 * width + heads * seq_len * weights_kept) / tensor
    return FLOAT32 * rows * seq_len / sequence * (layers * layer + 2 * width + 3 * vocabulary / tensor)


def in_flight(schedule: str, ranks: int, micro_batches: int, virtual_stages: int = 1) -> float:
    """Micro-batches whose activations the first rank of a pipeline holds at most, in whole ranks' worth.

    GPipe: all m (Huang et al. 2019). 1F1B: p (PipeDream-Flush, Narayanan et al. 2021a), and so ZB-H1 (Qi et
    al. 2023). Interleaved: 1 + (p - 1) / (p v) times p (Korthikanti et al. 2022). Never more than m.
    """
    wanted: float = micro_batches if schedule == "gpipe" else ranks
    if schedule == "interleaved":
        wanted += (ranks - 1) / virtual_stages
    return min(wanted, micro_batches)


# Time that a rank is idle -------------------------------------------------------------------------


def bubble(
    schedule: str,
    ranks: int,
    micro_batches: int,
    virtual_stages: int = 1,
    times: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> float:
    """The share of a step in which a rank of a pipeline waits, if messages take no time and stages are equal.

    GPipe and 1F1B wait for p - 1 micro-batches: (p - 1) / (m + p - 1) (Huang et al. 2019). With v stages on a
    rank these are shorter: (p - 1) / (v m + p - 1) (Narayanan et al. 2021b, section 2.2, who divide by the
    time without waiting and write (p - 1) / (v m)). ZB-H1 waits (p - 1) (F + B - W) (Qi et al. 2023, table
    2): a third where all are equal.

    Args:
        schedule: "gpipe", "1f1b", "interleaved" or "zero-bubble".
        ranks: p.
        micro_batches: m.
        virtual_stages: v, of the interleaved schedule.
        times: of a micro-batch on a rank: F forward, B to the gradients of inputs, W to those of weights.
    """
    forward, inputs, weights = times
    busy = micro_batches * (forward + inputs + weights)
    idle = (ranks - 1) * (forward + inputs + weights)
    if schedule == "interleaved":
        idle /= virtual_stages
    elif schedule == "zero-bubble":
        idle = (ranks - 1) * max(0.0, forward + inputs - weights)
    return idle / (idle + busy)


def imbalance(ranks: int) -> float:
    """How much more than the mean the last of s ranks computes in causal attention over plain stretches.

    Its tokens look at all stretches before theirs and at half of their own: (2 s - 1) / s. The order of
    `tf_dist.parallel.sequence` has 1.
    """
    return (2 * ranks - 1) / ranks


# A grid ---------------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Of a Transformer and its batches; names as in the legend, ``rows`` is B."""

    parameters: int
    layers: int
    width: int
    heads: int
    vocabulary: int
    seq_len: int
    rows: int


class Costs(NamedTuple):
    """Of the rank of a grid that has most, for one step; bytes, but for ``bubble``, a share of the time."""

    gradient_bytes: float
    activation_bytes_sent: float
    state_bytes: float
    activation_bytes: float
    bubble: float


def of_grid(
    sizes: Sizes,
    micro_batches: int,
    shape: tuple[int, int, int, int] = (1, 1, 1, 1),
    *,
    stage: int = 0,
    schedule: str = "1f1b",
    virtual_stages: int = 1,
    weights_kept: bool = True,
) -> Costs:
    """All of the above for a grid of data x pipeline x sequence x tensor, as `tf_dist.parallel.mesh.Mesh`.

    Weights are taken to be divided evenly, 1 / (t p) of them on each rank.

    Args:
        sizes: of model and micro-batches.
        micro_batches: of all data ranks together, in a step.
        shape: ranks along each axis.
        stage: of ZeRO, over data x sequence; 0: allreduce.
        schedule: of the pipeline.
        virtual_stages: v, of the interleaved schedule.
        weights_kept: as in `activation_bytes`.
    """
    data, p, s, t = shape
    m, replicas, mine = -(-micro_batches // data), data * s, sizes.parameters / (p * t)
    _, layers, width, heads, vocabulary, seq_len, rows = sizes
    gradients = zero_bytes(mine, replicas, stage, m) if stage else allreduce_bytes(FLOAT32 * mine, replicas)
    own = seq_len // s
    sent = tensor_bytes(rows, own, width, layers / p, t, m)
    sent += max(pipeline_bytes(rows, own, width, p, rank, m, virtual_stages) for rank in range(p))
    sent += ring_bytes(rows, seq_len, width // t, layers, s, m) / p

    def held(vocabulary: int) -> float:
        options = {"tensor": t, "sequence": s}
        here = (rows, seq_len, layers / p, width, heads, vocabulary)
        return activation_bytes(*here, **options, weights_kept=weights_kept)

    # The first rank keeps most micro-batches, the last one the logits of the one it is at.
    first, last = in_flight(schedule, p, m, virtual_stages) * held(0), held(vocabulary)
    if schedule == "gpipe":
        last += (m - 1) * held(0)
    waits = bubble(schedule, p, m, virtual_stages) if p > 1 else 0.0
    return Costs(
        gradients, sent, state_bytes(mine, replicas, stage), max(first, last) if p > 1 else last, waits
    )
