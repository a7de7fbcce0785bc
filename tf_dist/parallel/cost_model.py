"""Cost model of parallel training, by formula: bytes sent, memory held, idle time.

For planning and for benchmarks, which print measured values next to these. Formulas name their sources;
docs/parallelism.md derives them. Nothing here is measured.

Legend: P parameters, N ranks along one axis, S = 4 P bytes of a gradient, B rows of a micro-batch, T
tokens, D width, H heads, V vocabulary, L layers, m micro-batches of a rank in a step, p ranks of a pipeline
with v stages each, t tensor-parallel ranks, s context-parallel ranks.
"""

from __future__ import annotations

from typing import NamedTuple

# Bytes per element of weights, gradients, sums and optimizer state. Compute precision may be lower.
FLOAT32 = 4

# Bytes that a rank sends in a step ----------------------------------------------------------------


def allreduce_bytes(size: float, ranks: int) -> float:
    """Bytes that each rank sends to all-reduce ``size`` bytes: 2 (N - 1) / N of them.

    The lower bound; ring and Rabenseifner's algorithm reach it (Thakur et al. 2005).
    """
    return 2 * (ranks - 1) / ranks * size


def tree_sum_bytes(parameters: int, ranks: int, terms: int = 1) -> float:
    """The same in tree order, by messages (docs/exactness.md): (k + 1) (N - 1) / N S.

    Args:
        parameters: P.
        ranks: N.
        terms: k, how many subtrees this rank has; 1 if N is a power of two that divides the micro-batches.
    """
    return (terms + 1) * (ranks - 1) / ranks * FLOAT32 * parameters


def zero_bytes(parameters: float, ranks: int, stage: int, micro_batches: int = 1) -> float:
    """Bytes that each rank sends by messages, with ZeRO (Rajbhandari et al. 2020, section 7).

    Stage 1: a reduce-scatter of the sum and an all-gather of the weights, together one all-reduce. Stage 2: a
    reduce-scatter of the gradient of each micro-batch, and one all-gather of the weights. Stage 3: weights
    are gathered for the forward and once more for the backward pass of each micro-batch. The paper's 2 P and
    3 P elements are those of one micro-batch.

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
    """Bytes that each rank sends with t-way tensor parallelism of a Transformer.

    Each layer all-reduces (B, T, D) four times, after attention and after the feed-forward network in the
    forward pass, before them in the backward pass: 8 B T D (t - 1) / t numbers (Narayanan et al. 2021b,
    section 3.2). A partitioned vocabulary reduces (B, T, D) twice more, and sends 4 numbers for each token in
    the loss.
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

    The first stage sends nothing backward and the last one nothing forward. With v stages on a rank it is v
    times as much (Narayanan et al. 2021b, section 2.2).

    Args:
        rows: B.
        seq_len: T.
        width: D.
        ranks: p.
        rank: 0 <= rank < p.
        micro_batches: m.
        virtual_stages: v.
        itemsize: bytes of a number in compute precision.
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
    """Bytes that each rank sends with s-way context parallelism (`tf_dist.layers.ring_attention`).

    In every layer keys and values, (B, T / s, D) each, are passed s - 1 times to the next rank in the forward
    pass (Liu et al. 2023), and once more in the backward pass, with their gradients, in float32.

    Args:
        rows: B.
        seq_len: T.
        width: D, of the heads that this rank has.
        layers: L.
        ranks: s.
        micro_batches: m.
        itemsize: bytes of a number in compute precision.
    """
    block = rows * (seq_len // ranks) * width
    return micro_batches * layers * (ranks - 1) * block * (4 * itemsize + 2 * FLOAT32)


# Memory --------------------------------------------------------------------------------------------


def state_bytes(parameters: float, ranks: int = 1, stage: int = 0, slots: int = 2) -> float:
    """Bytes of weights, gradient and optimizer state of a rank, in float32.

    With Adam's two moments 16 P; 8 + 8 / N, 4 + 12 / N and 16 / N bytes for each parameter in the stages of
    ZeRO (the arithmetic of Rajbhandari et al. 2020, figure 1, for float32 instead of mixed precision).

    Args:
        parameters: P, of this rank: about 1 / (t p) of all if t x p ranks partition the model.
        ranks: N, along data.
        stage: of ZeRO; 0: everything replicated.
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
    """Bytes of activations of one micro-batch in a Transformer of this project, float32, no dropout.

    For each token and layer, after Korthikanti et al. (2022): the inputs of both norms and of the layers
    after them, 4 D, replicated on tensor-parallel ranks; queries, keys and values, the attention output, and
    both sides of the GELU, 12 D, partitioned; and attention weights, H T. Then 2 D, and three times the
    logits.

    Args:
        rows: B.
        seq_len: T.
        layers: L, of this rank.
        width: D.
        heads: H.
        vocabulary: V; 0 on ranks of a pipeline without the last stage.
        tensor: t.
        sequence: s.
        weights_kept: whether attention weights are stored; blockwise (`tf_dist.models.attention`) and ring
            attention do not.
    """
    layer = 4 * width + (12 * width + heads * seq_len * weights_kept) / tensor
    return FLOAT32 * rows * seq_len / sequence * (layers * layer + 2 * width + 3 * vocabulary / tensor)


def in_flight(schedule: str, ranks: int, micro_batches: int, virtual_stages: int = 1) -> float:
    """Micro-batches whose activations the first rank of a pipeline holds at most, in full ranks' worth.

    GPipe: all m (Huang et al. 2019). 1F1B: p (PipeDream-Flush, Narayanan et al. 2021a), and so ZB-H1 (Qi et
    al. 2023). Interleaved: 1 + (p - 1) / (p v) times p (Korthikanti et al. 2022). Never more than m.
    """
    wanted: float = micro_batches if schedule == "gpipe" else ranks
    if schedule == "interleaved":
        wanted += (ranks - 1) / virtual_stages
    return min(wanted, micro_batches)


# Idle time -----------------------------------------------------------------------------------------


def bubble(
    schedule: str,
    ranks: int,
    micro_batches: int,
    virtual_stages: int = 1,
    times: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> float:
    """Fraction of a step in which a rank of a pipeline is idle, with instant messages and equal stages.

    GPipe and 1F1B wait for p - 1 micro-batches: (p - 1) / (m + p - 1) (Huang et al. 2019). With v stages on a
    rank these are shorter: (p - 1) / (v m + p - 1) (Narayanan et al. 2021b, section 2.2, who divide by the
    time without waiting and write (p - 1) / (v m)). ZB-H1 waits (p - 1) (F + B - W) (Qi et al. 2023, table
    2): a third if all are equal.

    Args:
        schedule: "gpipe", "1f1b", "interleaved" or "zero-bubble".
        ranks: p.
        micro_batches: m.
        virtual_stages: v, of the interleaved schedule.
        times: of a micro-batch on a rank: F forward, B for input gradients, W for weight gradients.
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
    """Load of the last of s ranks in causal attention over contiguous slices, relative to the mean.

    Its tokens attend to all slices before theirs and to half of their own: (2 s - 1) / s. The zigzag layout
    of `tf_dist.parallel.context_partition` has 1.
    """
    return (2 * ranks - 1) / ranks


# Device mesh --------------------------------------------------------------------------------------


class Sizes(NamedTuple):
    """Sizes of a Transformer and its batches; names as in the legend, ``rows`` is B."""

    parameters: int
    layers: int
    width: int
    heads: int
    vocabulary: int
    seq_len: int
    rows: int


class Costs(NamedTuple):
    """Costs of one step on the rank with the highest; in bytes, except ``bubble``, a fraction of the time."""

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
    """All of the above for a mesh of data x pipeline x sequence x tensor, as `tf_dist.parallel.mesh.Mesh`.

    Assumes that weights are partitioned evenly, 1 / (t p) of them on each rank.

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

    # The first rank holds most micro-batches, the last one the logits of its current one.
    first, last = in_flight(schedule, p, m, virtual_stages) * held(0), held(vocabulary)
    if schedule == "gpipe":
        last += (m - 1) * held(0)
    waits = bubble(schedule, p, m, virtual_stages) if p > 1 else 0.0
    return Costs(
        gradients, sent, state_bytes(mine, replicas, stage), max(first, last) if p > 1 else last, waits
    )
