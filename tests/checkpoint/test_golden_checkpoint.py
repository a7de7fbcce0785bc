"""Checkpoints of earlier releases, kept as they were written: every later release must read them.

A new version of the format adds a folder to ``golden/``; none is ever written again.
"""

from pathlib import Path

import numpy as np
import pytest

from tf_dist.checkpoint import store
from tf_dist.checkpoint.manifest import DTYPES, VERSION

GOLDEN = sorted((Path(__file__).parent / "golden").iterdir())


def tensor(number, dtype):
    """What was written: a few exact numbers of each type, a scalar, and an empty array."""
    shape = [(2, 3), (), (0, 4)][number % 3]
    values = np.arange(np.prod(shape, dtype=int)) * 37 - 50 * (np.dtype(dtype).kind in "if")
    return values.astype(dtype).reshape(shape)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda folder: folder.name)
def test_it_is_read_as_it_was_written(folder):
    (path,) = store.listing(folder)
    tensors, facts, step = store.load(path)
    assert step == 3 and facts == {"tokens": 12345, "config": {"model": "lstm", "tie_embeddings": False}}
    # bfloat16 came with version 3.
    dtypes = [one for one in DTYPES if one != "bfloat16" or folder.name not in ("version-1", "version-2")]
    wanted = {f"weights/{i:04d}/{dtype}": tensor(i, dtype) for i, dtype in enumerate(dtypes)}
    assert list(tensors) == list(wanted)
    for name, array in wanted.items():
        assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
        assert tensors[name].tobytes() == array.tobytes()


def test_there_is_one_of_this_version():
    assert f"version-{VERSION}" in [folder.name for folder in GOLDEN]
