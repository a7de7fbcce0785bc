"""Frames and patches as words: what goes in comes out, padding is -1."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tf_dist.data.packed_frames import pack_words, pad_words, stack_frames, unpack_words, unstack_frames
from tf_dist.errors import DataError, UsageError

HALVES = st.floats(width=16, allow_infinity=False, allow_nan=True)
SHAPES = st.tuples(st.integers(0, 5), st.sampled_from([2, 4, 6]))


def same(one, other):
    np.testing.assert_array_equal(one, other, strict=True)


@given(SHAPES.flatmap(lambda shape: arrays(np.float16, shape, elements=HALVES)))
def test_words_hold_all_float16_values(values):
    words = pack_words(values)
    assert words.dtype == np.int32 and words.shape == (values.size // 2,)
    same(unpack_words(words, values.shape[1]), values.astype(np.float32))
    assert ((words == -1) == np.isnan(values.reshape(-1, 2)).all(axis=1)).all()


def test_the_layout_of_a_word():
    # 1.0 is 0x3c00, -2.0 is 0xc000; the first value lies in the lower half.
    assert pack_words(np.array([[1.0, -2.0]])).tolist() == [0xC0003C00 - (1 << 32)]
    assert pack_words(np.array([[np.nan, 1.0], [np.nan, -np.nan]])).tolist() == [0x3C00FFFF, -1]


def test_values_are_rounded_to_float16():
    values = np.random.default_rng(1).standard_normal((7, 80)).astype(np.float32)
    same(unpack_words(pack_words(values), 80), values.astype(np.float16).astype(np.float32))


def test_rows_are_padded_with_minus_one():
    words = pad_words(pack_words(np.ones((2, 4))), 8)
    assert words.dtype == np.int32 and words[4:].tolist() == [-1] * 4
    assert np.isnan(unpack_words(words, 4)[2:]).all() and (unpack_words(words, 4)[:2] == 1).all()
    with pytest.raises(DataError, match=r"9 words .* in a row of 8"):
        pad_words(np.zeros(9, np.int32), 8)


@pytest.mark.parametrize("wrong", [65520.0, np.inf, -1e30])
def test_values_beyond_float16_are_refused(wrong):
    with pytest.raises(DataError, match=r"beyond float16 \(65504\)"):
        pack_words(np.array([[0.0, wrong]]))
    assert pack_words(np.array([[0.0, 65504.0]])).shape == (1,)


def test_shapes_that_do_not_fill_words():
    for wrong in (np.zeros((2, 3)), np.zeros(4)):
        with pytest.raises(UsageError, match="do not fill words"):
            pack_words(wrong)
    for words, values in ((4, 3), (5, 4), (4, 0)):
        with pytest.raises(UsageError, match="are not positions"):
            unpack_words(np.zeros(words, np.int32), values)


@given(st.integers(1, 13), st.integers(1, 4))
def test_stacked_frames_come_back(frames, r):
    values = np.arange(frames * 2, dtype=np.float32).reshape(frames, 2)
    stacked = stack_frames(values, r)
    assert stacked.shape == (-(-frames // r), 2 * r)
    assert int(np.isnan(stacked).sum()) == stacked.size - values.size
    same(unstack_frames(stacked, r), values)
    padded = pad_words(pack_words(stacked), stacked.size // 2 + 2 * r)
    same(unstack_frames(unpack_words(padded, 2 * r), r), values)


def test_nothing_but_padding_is_no_frame():
    assert unstack_frames(np.full((3, 4), np.nan), 2).shape == (0, 2)
    assert stack_frames(np.zeros((0, 2)), 3).shape == (0, 6)
    with pytest.raises(UsageError):
        stack_frames(np.zeros((1, 2)), 0)
    with pytest.raises(UsageError):
        unstack_frames(np.zeros((1, 5)), 2)
