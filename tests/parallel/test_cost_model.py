"""Formulas of costs against counting, where it can be counted, and against what they must be at the ends.

Legend: p ranks of a pipeline, m micro-batches, s ranks that share rows.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.parallel import cost_model

P = 1_000_000
ranks = st.integers(1, 16)


@given(ranks)
def test_sums_in_the_order_of_the_tree_send_no_more_where_a_rank_has_one_term(n):
    assert cost_model.tree_sum_bytes(P, n) == pytest.approx(cost_model.allreduce_bytes(4 * P, n))
    assert cost_model.allreduce_bytes(4 * P, 1) == 0
    assert cost_model.allreduce_bytes(4 * P, n) < 8 * P


@given(ranks)
def test_zero_sends_an_allreduce_and_half_more_in_stage_3(n):
    allreduce = cost_model.allreduce_bytes(4 * P, n)
    sent = [cost_model.zero_bytes(P, n, stage) for stage in (1, 2, 3)]
    np.testing.assert_allclose(sent, [allreduce, allreduce, 1.5 * allreduce])
    assert cost_model.zero_bytes(P, n, 1, micro_batches=8) == cost_model.zero_bytes(P, n, 1)
    assert cost_model.zero_bytes(P, n, 3, micro_batches=8) == 8 * cost_model.zero_bytes(P, n, 3)


@given(ranks)
def test_state_of_adam_is_that_of_the_paper_in_float32(n):
    each = [cost_model.state_bytes(P, n, stage) / P for stage in range(4)]
    np.testing.assert_allclose(each, [16, 8 + 8 / n, 4 + 12 / n, 16 / n])
    assert cost_model.state_bytes(P, n, 3, slots=0) == pytest.approx(8 * P / n)


def test_tensor_parallel_sends_what_megatron_counts():
    sizes = {"rows": 4, "seq_len": 128, "width": 256}
    for n in (2, 4, 8):
        a_layer = cost_model.tensor_bytes(layers=3, ranks=n, **sizes) - cost_model.tensor_bytes(
            layers=2, ranks=n, **sizes
        )
        assert a_layer == pytest.approx(4 * 8 * 4 * 128 * 256 * (n - 1) / n)
    assert cost_model.tensor_bytes(layers=3, ranks=1, **sizes) == 0


@pytest.mark.parametrize("v", [1, 3])
@pytest.mark.parametrize("p", [1, 2, 5])
def test_pipelines_send_over_each_boundary_of_stages_once_each_way(p, v):
    m, block = 7, 2 * 8 * 16 * 4
    total = sum(cost_model.pipeline_bytes(2, 8, 16, p, rank, m, v) for rank in range(p))
    boundaries = p * v - 1 if p > 1 else 0  # stages of one rank that follow each other on it send nothing
    assert total == 2 * boundaries * m * block


@given(st.integers(1, 9), st.integers(1, 4))
def test_a_ring_sends_keys_values_and_gradients_to_all_others(s, layers):
    block = 3 * 10 * 8  # numbers of the keys of a rank
    sizes = {"rows": 3, "seq_len": 10 * s, "width": 8, "layers": layers, "ranks": s}
    assert cost_model.ring_bytes(**sizes) == layers * (s - 1) * block * 6 * 4
    assert cost_model.ring_bytes(**sizes, itemsize=2) == layers * (s - 1) * block * (4 * 2 + 2 * 4)


def test_activations():
    sizes = {"rows": 2, "seq_len": 64, "layers": 3, "width": 32, "heads": 4, "vocabulary": 100}
    whole = cost_model.activation_bytes(**sizes)
    assert whole == 4 * 2 * 64 * (3 * (16 * 32 + 4 * 64) + 2 * 32 + 3 * 100)  # as bench/memory.py
    assert cost_model.activation_bytes(**sizes, sequence=4) == whole / 4
    blockwise = cost_model.activation_bytes(**sizes, weights_kept=False)
    assert whole - blockwise == 4 * 2 * 64 * 3 * 4 * 64
    shared = cost_model.activation_bytes(**sizes, tensor=4)
    assert shared > whole / 4  # norms and their outputs are whole on each
    assert shared == pytest.approx(whole / 4 + 0.75 * 4 * 2 * 64 * (3 * 4 * 32 + 2 * 32))


# Pipelines, gone through -------------------------------------------------------------------------


def instructions(name, p, m, rank):
    """Forward (F) and backward (B) passes of a rank, by the definitions of GPipe and 1F1B."""
    if name == "gpipe":
        return [("F", i) for i in range(m)] + [("B", i) for i in range(m)]
    ahead = min(m, p - 1 - rank)
    found = [("F", i) for i in range(ahead)]
    for i in range(m):
        found += [("F", i + ahead)] if i + ahead < m else []
        found.append(("B", i))
    return found


def gone_through(name, p, m, forward=1.0, backward=2.0):
    """When the last rank is done, and how many micro-batches the first rank holds at most."""
    ends, clocks = {}, [0.0] * p
    todo = [instructions(name, p, m, rank) for rank in range(p)]
    while any(todo):
        for rank in range(p):
            while todo[rank]:
                kind, i = todo[rank][0]
                needed = (kind, i, rank - 1) if kind == "F" else (kind, i, rank + 1)
                first = needed[2] in (-1, p)
                if not first and needed not in ends:
                    break
                begin = max(clocks[rank], 0.0 if first else ends[needed])
                clocks[rank] = begin + (forward if kind == "F" else backward)
                ends[kind, i, rank] = clocks[rank]
                todo[rank].pop(0)
    held = np.cumsum([1 if kind == "F" else -1 for kind, _ in instructions(name, p, m, 0)])
    return max(clocks), held.max()


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@given(st.integers(1, 6), st.integers(1, 12))
def test_bubbles_and_memory_are_those_of_going_through_it(name, p, m):
    ends, held = gone_through(name, p, m)
    assert cost_model.bubble(name, p, m) == pytest.approx((p - 1) / (m + p - 1))
    assert cost_model.bubble(name, p, m) == pytest.approx(1 - 3 * m / ends)
    assert cost_model.in_flight(name, p, m) == held


def test_bubbles_of_the_other_schedules():
    assert cost_model.bubble("interleaved", 4, 8, 1) == cost_model.bubble("1f1b", 4, 8)
    assert cost_model.bubble("interleaved", 4, 8, 2) == pytest.approx(3 / (2 * 8 + 3))
    assert cost_model.bubble("zero-bubble", 4, 8) == pytest.approx(1 / (8 + 1))  # a third of 3
    assert cost_model.bubble("zero-bubble", 4, 8, times=(1, 1, 2)) == 0
    assert cost_model.in_flight("zero-bubble", 4, 8) == cost_model.in_flight("1f1b", 4, 8) == 4
    assert cost_model.in_flight("interleaved", 4, 99, 3) == pytest.approx(4 * (1 + 3 / (4 * 3)))
    for name in ("gpipe", "1f1b", "interleaved", "zero-bubble"):
        assert cost_model.bubble(name, 1, 8, 2) == 0


@given(st.integers(1, 12), st.integers(1, 5))
def test_plain_stretches_give_the_last_rank_most(s, each):
    """Counted in the triangle of pairs, with the diagonal's pixels as halves."""
    T = s * each
    pairs = np.tril(np.ones((T, T)), -1) + np.eye(T) / 2
    work = pairs.reshape(s, each, T).sum((1, 2))
    assert work.max() / work.mean() == pytest.approx(cost_model.imbalance(s))


# Grids -------------------------------------------------------------------------------------------

GPT2 = cost_model.Sizes(124_439_808, 12, 768, 12, 50_257, 1024, 1)


def test_a_grid_of_one_is_one_rank():
    found = cost_model.of_grid(GPT2, 16)
    assert found.gradient_bytes == found.activation_bytes_sent == found.bubble == 0
    assert found.state_bytes == 16 * GPT2.parameters
    assert found.activation_bytes == cost_model.activation_bytes(1, 1024, 12, 768, 12, 50_257)


def test_each_axis_costs_what_it_alone_costs():
    data, stages = cost_model.of_grid(GPT2, 16, (8, 1, 1, 1)), cost_model.of_grid(GPT2, 16, (1, 4, 1, 1))
    rows, layers = cost_model.of_grid(GPT2, 16, (1, 1, 4, 1)), cost_model.of_grid(GPT2, 16, (1, 1, 1, 4))
    one = cost_model.of_grid(GPT2, 16)
    size = 4 * GPT2.parameters
    assert (
        data.gradient_bytes == rows.gradient_bytes * (7 / 8) / (3 / 4) == cost_model.allreduce_bytes(size, 8)
    )
    assert data.activation_bytes == one.activation_bytes == 4 * rows.activation_bytes
    assert stages.state_bytes == layers.state_bytes == one.state_bytes / 4 < rows.state_bytes
    assert stages.bubble == cost_model.bubble("1f1b", 4, 16)
    assert stages.activation_bytes_sent == 2 * 16 * 1024 * 768 * 4
    assert layers.activation_bytes_sent == cost_model.tensor_bytes(1, 1024, 768, 12, 4, 16)
    assert rows.activation_bytes_sent == cost_model.ring_bytes(1, 1024, 768, 12, 4, 16)
    for name in ("gpipe", "zero-bubble"):
        assert cost_model.of_grid(GPT2, 16, (1, 4, 1, 1), schedule=name).gradient_bytes == 0


def test_several_stages_of_a_rank_wait_less_and_send_more():
    shape = (1, 4, 1, 1)
    one, two = (cost_model.of_grid(GPT2, 16, shape, schedule="interleaved", virtual_stages=v) for v in (1, 2))
    assert two.bubble == cost_model.bubble("interleaved", 4, 16, 2) < one.bubble
    assert two.activation_bytes_sent == 2 * one.activation_bytes_sent  # of ranks between the ends
    assert two.activation_bytes < one.activation_bytes
    assert two.state_bytes == one.state_bytes


def test_zero_divides_state_over_all_replicas():
    shape = (2, 1, 2, 1)
    assert cost_model.of_grid(GPT2, 16, shape, stage=3).state_bytes == 16 * GPT2.parameters / 4
