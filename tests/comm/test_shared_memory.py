"""How the additions of a tree are divided between nodes: every one once, and those of a node by itself."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.comm.transport.reduction_order import add_in_order
from tf_dist.comm.transport.shared_memory import by_node
from tf_dist.parallel.reduction_tree import order, subtrees


@given(st.data())
def test_nodes_first_then_between_them_gives_the_same_bits(data):
    ranks = data.draw(st.integers(1, 6))
    cuts = sorted(data.draw(st.lists(st.integers(1, 12), min_size=ranks, max_size=ranks)))
    leaves = range(cuts[-1])
    blocks = [range(start, stop) for start, stop in zip([0, *cuts[:-1]], cuts, strict=True)]
    node_of = [0, *data.draw(st.lists(st.integers(0, 2), min_size=ranks - 1, max_size=ranks - 1))]
    nodes = [
        [r for r in range(ranks) if node_of[r] == node] for node in sorted(set(node_of), key=node_of.index)
    ]
    made = order(leaves, blocks)
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    terms = [
        random.standard_normal(3).astype(np.float32) for block in blocks for _ in subtrees(leaves, block)
    ]
    expected = add_in_order([term.copy() for term in terms], made.additions)

    shares, rest = by_node(made, nodes)
    starts = np.cumsum([0, *made.counts])
    left = []
    for share, mine in zip(shares, nodes, strict=True):
        local = [terms[t].copy() for rank in mine for t in range(starts[rank], starts[rank + 1])]
        for i, j in share.additions:
            local[i] += local[j]
        left += [local[term] for term in share.left]
    assert rest.counts == tuple(len(share.left) for share in shares)
    assert add_in_order(left, rest.additions).tobytes() == expected.tobytes()


def test_equal_powers_of_two_leave_one_term_a_node():
    made = order(range(8), [range(2 * rank, 2 * rank + 2) for rank in range(4)])
    shares, rest = by_node(made, [[0, 1], [2, 3]])
    assert [share.left for share in shares] == [(0,), (0,)]
    assert rest.additions == ((0, 1),)
