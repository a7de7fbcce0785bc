"""Train/validation split: by a hash of each document or row, so it does not depend on ranks.

Legend: N rows, G groups of rows with equal content, L labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tf_dist.data.sampler import MASK, Words, mix, mix_words
from tf_dist.errors import UsageError


def check_fraction(val_fraction: float) -> None:
    """Raise `UsageError` unless 0 <= ``val_fraction`` < 1."""
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction is {val_fraction}: it must be at least 0 and less than 1.")


def choose_validation(sizes: npt.NDArray[np.int64], val_fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose documents with about ``val_fraction`` of all bytes, at least one and never all.

    Documents are taken in the order of a hash of (seed, number) as long as they fit; if none fits, the
    smallest is taken. A single document is not taken.

    Args:
        sizes: bytes of each document, shape (documents,).
        val_fraction: of the bytes; 0 takes none.
        seed: of the hash.

    Returns:
        True for validation documents, shape (documents,).
    """
    chosen = np.zeros(len(sizes), dtype=np.bool_)
    if not val_fraction or len(sizes) < 2:
        return chosen
    numbers = np.arange(len(sizes), dtype=np.uint64)
    order = np.argsort(mix_words(numbers ^ np.uint64(mix(seed & MASK))), kind="stable")
    left, smallest = int(sizes.sum() * val_fraction), int(sizes.min())
    for number in order:
        if left < smallest:
            break
        if sizes[number] <= left:
            chosen[number] = True
            left -= int(sizes[number])
    if not chosen.any():
        chosen[order[np.argmin(sizes[order])]] = True
    return chosen


def train_characters(characters: int, val_fraction: float) -> int:
    """Number of characters of a single document for training; the rest is for validation."""
    return int(characters * (1 - val_fraction))


def content_keys(rows: Iterable[Sequence[str]]) -> Words:
    """A hash of each row's content: equal rows have equal keys, on every machine and in every order of rows.

    Args:
        rows: the texts of each row, as (source, target).

    Returns:
        uint64 of shape (N,).
    """
    digests = bytearray()
    for texts in rows:
        digest = hashlib.blake2b(digest_size=8)
        for text in texts:
            data = text.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        digests += digest.digest()
    return np.frombuffer(bytes(digests), dtype="<u8").astype(np.uint64)


def split_rows(keys: Words, val_fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Choose about ``val_fraction`` of the rows: at least one, and never all; rows of equal keys together.

    Args:
        keys: of `content_keys`, shape (N,).
        val_fraction: of the rows; 0 takes none.
        seed: of the choice.

    Returns:
        True for validation rows, shape (N,).

    Raises:
        UsageError: as of `check_fraction`.
    """
    return stratified_split(np.zeros(len(keys), dtype=np.int64), val_fraction, seed, keys)


def stratified_split(
    labels: Sequence[str] | npt.NDArray[np.int64], val_fraction: float, seed: int, keys: Words | None = None
) -> npt.NDArray[np.bool_]:
    """Choose about ``val_fraction`` of the rows of each label; every label keeps a row for training.

    The number of validation rows of a label is its share, rounded down; what is left of the total goes to the
    labels with the largest remainders. Rows of equal keys stay together, with the label of the first of them,
    and are taken in the order of a hash of (seed, key) as long as they fit.

    Args:
        labels: of each row, shape (N,).
        val_fraction: of the rows; 0 takes none.
        seed: of the choice.
        keys: of `content_keys`, shape (N,); None takes the number of each row.

    Returns:
        True for validation rows, shape (N,).

    Raises:
        UsageError: as of `check_fraction`; not as many keys as labels.
    """
    check_fraction(val_fraction)
    keys = np.arange(len(labels), dtype=np.uint64) if keys is None else keys
    if len(keys) != len(labels):
        raise UsageError(f"{len(keys)} keys for {len(labels)} labels: there must be one for each row.")
    if not val_fraction or len(labels) < 2:
        return np.zeros(len(labels), dtype=np.bool_)
    label_N = np.unique(np.asarray(labels), return_inverse=True)[1].reshape(-1)
    _, first_G, group_N, rows_G = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    group_N = group_N.reshape(-1)
    label_G, order_G = label_N[first_G], np.argsort(_hashes(keys[first_G], seed), kind="stable")
    left_L = _quotas(np.bincount(label_G, rows_G).astype(np.int64), np.bincount(label_G), val_fraction)
    chosen_G = np.zeros(len(first_G), dtype=np.bool_)
    for group in order_G:
        label = label_G[group]
        if rows_G[group] <= left_L[label]:
            chosen_G[group] = True
            left_L[label] -= rows_G[group]
    _keep_every_label(label_N, group_N, chosen_G)
    return np.asarray(chosen_G[group_N])


def _hashes(keys: Words, seed: int) -> Words:
    return mix_words(keys ^ np.uint64(mix(seed & MASK)))


def _quotas(
    rows_L: npt.NDArray[np.int64], groups_L: npt.NDArray[np.int64], val_fraction: float
) -> npt.NDArray[np.int64]:
    """Validation rows of each label: largest remainders; none where all rows of a label are one group."""
    able_L = groups_L > 1
    share_L = np.where(able_L, rows_L * val_fraction, 0.0)
    quota_L = np.floor(share_L).astype(np.int64)
    total = max(1, round(int(rows_L.sum()) * val_fraction))
    for label in np.argsort(quota_L - share_L, kind="stable"):
        if quota_L.sum() >= total:
            break
        if able_L[label] and quota_L[label] < rows_L[label] - 1:
            quota_L[label] += 1
    return quota_L


def _keep_every_label(
    label_N: npt.NDArray[np.int64], group_N: npt.NDArray[np.int64], chosen_G: npt.NDArray[np.bool_]
) -> None:
    """Where equal content has several labels, one may have lost all its rows: its first group goes back."""
    in_training = np.unique(label_N[~chosen_G[group_N]])
    for label in np.setdiff1d(label_N, in_training):
        chosen_G[group_N[np.argmax(label_N == label)]] = False
