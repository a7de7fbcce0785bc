import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tf_dist.data import tokens as tokens_module
from tf_dist.data.tokens import (
    Sequences,
    TokenWriter,
    content_sha256,
    map_tokens,
    sample_sha256,
    sampled,
    token_dtype,
)
from tf_dist.errors import DataError, UsageError


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 60), st.integers(1, 12))
def test_every_token_but_the_first_is_a_target_once(n, seq_len):
    tokens = np.arange(n, dtype=np.uint16)
    sequences = Sequences(tokens, seq_len)
    assert len(sequences) == max(0, -(-(n - 1) // seq_len))
    x, y = sequences.rows(np.arange(len(sequences)))
    assert x.dtype == y.dtype == np.int32
    assert x.shape == y.shape == (len(sequences), seq_len)
    assert y[y >= 0].tolist() == list(range(1, n))
    assert x[y >= 0].tolist() == list(range(n - 1))
    assert (x[y < 0] == 0).all()


def test_padding_rows_and_any_order():
    sequences = Sequences(np.arange(10, 20, dtype=np.uint32), 4)
    x, y = sequences.rows([2, -1, 0])
    assert x.tolist() == [[18, 0, 0, 0], [0, 0, 0, 0], [10, 11, 12, 13]]
    assert y.tolist() == [[19, -1, -1, -1], [-1, -1, -1, -1], [11, 12, 13, 14]]


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_tokens_still_give_padding(n):
    x, y = Sequences(np.zeros(n, dtype=np.uint16), 3).rows([-1, -1])
    assert x.tolist() == [[0] * 3] * 2
    assert y.tolist() == [[-1] * 3] * 2
    assert Sequences(np.zeros(n, dtype=np.uint16), 3).rows([])[0].shape == (0, 3)


@pytest.mark.parametrize("index", [-2, 3])
def test_no_such_window(index):
    with pytest.raises(IndexError, match="there are 3"):
        Sequences(np.arange(10), 4).rows([index])


def test_refuses():
    with pytest.raises(UsageError, match="seq_len is 0"):
        Sequences(np.arange(4), 0)
    with pytest.raises(DataError, match="one row of integers"):
        Sequences(np.zeros((2, 2)), 4)


@pytest.mark.parametrize(("vocab", "dtype"), [(1, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_written_and_mapped(tmp_path, vocab, dtype):
    assert token_dtype(vocab) == dtype
    with TokenWriter(tmp_path / "t.bin", dtype) as writer:
        writer.append(np.array([0, vocab - 1], dtype=np.uint32))
        writer.append(np.array([], dtype=np.uint32))
    assert writer.tokens == 2
    mapped = map_tokens(tmp_path / "t.bin", dtype)
    assert mapped.tolist() == [0, vocab - 1]
    assert mapped.dtype == np.dtype(dtype)
    little = np.array([0, vocab - 1], dtype=dtype).astype(f"<u{mapped.itemsize}")
    assert (tmp_path / "t.bin").read_bytes() == little.tobytes()


def test_empty_and_damaged_files(tmp_path):
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "odd.bin").write_bytes(b"abc")
    assert map_tokens(tmp_path / "empty.bin", "uint16").shape == (0,)
    with pytest.raises(DataError, match="no whole number of uint16"):
        map_tokens(tmp_path / "odd.bin", "uint16")
    with pytest.raises(DataError, match="cannot read"):
        map_tokens(tmp_path / "none.bin", "uint16")
    assert content_sha256(tmp_path / "odd.bin", tmp_path / "empty.bin") != content_sha256(
        tmp_path / "empty.bin", tmp_path / "odd.bin"
    )


@pytest.mark.parametrize("vocab", [0, 2**31 + 1])
def test_impossible_vocabularies(vocab):
    with pytest.raises(UsageError, match="vocab_size"):
        token_dtype(vocab)


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
@pytest.mark.parametrize("large", [False, True])
def test_digest_of_a_sample(monkeypatch, count, large):
    monkeypatch.setattr(tokens_module, "SAMPLED_BLOCK_TOKENS", 4)
    monkeypatch.setattr(tokens_module, "SAMPLED_BLOCKS", 10)
    if large and count == 1000:
        monkeypatch.setattr(tokens_module, "SAMPLED_FROM_BYTES", 100)
    tokens = np.arange(count, dtype="<u2") % 7
    looked_at = {start + place for start, block in sampled(tokens) for place in range(len(block))}
    assert looked_at == set(range(count)) or (
        large and {0, 3, 996, 999} <= looked_at and len(looked_at) == 40
    )
    digest = sample_sha256(tokens)
    assert digest == sample_sha256(tokens.copy())
    for place in looked_at:
        other = tokens.copy()
        other[place] ^= 1
        assert sample_sha256(other) != digest
    assert sample_sha256(np.append(tokens, tokens[:1] if count else [1]).astype("<u2")) != digest
    assert sample_sha256(tokens.astype("<u4")) != digest


def test_token_of_another_vocabulary(monkeypatch):
    tokens = np.arange(100, dtype=np.int64) % 10
    Sequences(tokens, 8).must_be_below(10)
    with pytest.raises(
        DataError, match=r"token id 9 at place 9 is not in the model's vocabulary of 9 \(0 to 8\)"
    ):
        Sequences(tokens, 8).must_be_below(9)
    tokens[77] = -3
    with pytest.raises(DataError, match="token id -3 at place 77 "):
        Sequences(tokens, 8).must_be_below(10)
    # Of very many tokens those between the samples are met where a batch is made of them.
    monkeypatch.setattr(tokens_module, "SAMPLED_FROM_BYTES", 100)
    monkeypatch.setattr(tokens_module, "SAMPLED_BLOCK_TOKENS", 4)
    monkeypatch.setattr(tokens_module, "SAMPLED_BLOCKS", 3)
    sequences = Sequences(tokens, 8)
    sequences.must_be_below(10)
    sequences.rows([0, 1, -1, 12])
    with pytest.raises(DataError, match="token id -3 at place 77 "):
        sequences.rows([0, 9])
