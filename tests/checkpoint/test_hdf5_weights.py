"""Files of weights from elsewhere: nothing of another file is read, and no more than a model has."""

import zipfile

import h5py
import numpy as np
import pytest

from tf_dist.checkpoint.hdf5_weights import checked
from tf_dist.errors import CheckpointError

LIMIT = 1 << 20


@pytest.fixture
def file(tmp_path):
    (tmp_path / "secret.bin").write_bytes(b"0123456789abcdef")
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["secret"] = np.arange(4.0)
    return tmp_path / "model.weights.h5"


def external(group, folder):
    group.create_dataset("0", (4,), "f4", external=[(str(folder / "secret.bin"), 0, 16)])


def external_link(group, folder):
    group["0"] = h5py.ExternalLink(str(folder / "other.h5"), "secret")


def soft_link(group, folder):
    group["0"] = h5py.SoftLink("/secret")


def virtual(group, folder):
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "secret", (4,))
    group.create_virtual_dataset("0", layout)


def huge(group, folder):
    group.create_dataset("0", (1 << 40,), "f4", chunks=(1 << 16,), compression="gzip")


@pytest.mark.parametrize(
    "attack", [external, external_link, soft_link, virtual, huge], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_refused(file, tmp_path, attack, packed):
    with h5py.File(file, "w") as made:
        attack(made.create_group("layers").create_group("dense").create_group("vars"), tmp_path)
    path = file
    if packed:
        path = tmp_path / "model.keras"
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.write(file, "model.weights.h5")
    with pytest.raises(CheckpointError), checked(path, LIMIT):
        pass


def test_plain_arrays_are_let_through(file):
    with h5py.File(file, "w") as made:
        made["a/vars/0"] = np.ones((4, 4), np.float32)
        made["b"] = made["a"]  # another name of the same, in a circle
        made["a/again"] = made["a"]
    with checked(file, LIMIT) as path:
        assert path == file


def test_a_member_that_unpacks_to_too_much(tmp_path):
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("model.weights.h5", bytes(LIMIT + 1))
    with pytest.raises(CheckpointError, match="is larger than"), checked(path, LIMIT):
        pass
