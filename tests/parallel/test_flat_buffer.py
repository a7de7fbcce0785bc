import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tf_dist.parallel.flat_buffer import ALIGNMENT_BYTES, FlatLayout, aligned_empty, norm

shapes = st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=6)


@given(shapes)
def test_views_lie_back_to_back_and_share_memory(shapes):
    layout = FlatLayout(shapes)
    assert layout.shapes == [tuple(shape) for shape in shapes]
    assert layout.total == sum(layout.sizes)
    buffer = np.arange(layout.total, dtype=np.float32)
    views = layout.views(buffer)
    assert [view.shape for view in views] == layout.shapes
    assert np.concatenate([[]] + [view.ravel() for view in views]).tolist() == buffer.tolist()
    for view in views:
        view[...] = -1
    assert (buffer == -1).all()


def test_a_number_and_nothing():
    number, nothing, row = FlatLayout([(), (0, 5), (2,)]).views(np.array([7.0, 1.0, 2.0]))
    assert number.shape == ()
    assert number == 7
    assert nothing.shape == (0, 5)
    assert row.tolist() == [1, 2]


def test_a_layout_does_not_change_with_the_list_it_was_made_of():
    shapes = [[2], [3]]
    layout = FlatLayout(shapes)
    shapes[0].append(9)
    assert layout.shapes == [(2,), (3,)]


@pytest.mark.parametrize("shape", [(4,), (6,), (5, 1), ()])
def test_buffers_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"takes a buffer of shape \(5,\)"):
        FlatLayout([(2,), (3, 1)]).views(np.zeros(shape))


@given(st.integers(0, 3000), st.sampled_from(["float32", "float64", "uint8", "int64"]))
def test_aligned(length, dtype):
    array = aligned_empty(length, np.dtype(dtype))
    assert array.shape == (length,)
    assert array.dtype == dtype
    assert not length or array.ctypes.data % ALIGNMENT_BYTES == 0
    assert array.flags.c_contiguous
    assert array.flags.writeable
    array.fill(3)
    assert (array == 3).all()


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 100_000])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm(length, scale):
    """Also where squares are beyond float32: 1e-30 squared is 0 in it, and 1e30 squared infinite."""
    array = (np.random.default_rng(length).standard_normal(length) * scale).astype(np.float32)
    assert norm(array) == pytest.approx(float(np.linalg.norm(array.astype(np.float64))), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5000, -1])
def test_a_bad_number_shows_in_the_norm(bad, place):
    array = np.ones(10_000, np.float32)
    array[place] = bad
    assert not np.isfinite(norm(array))
