"""`python -m tf_dist checkpoint`, on folders that were written, and then spoilt."""

import subprocess
import sys

import numpy as np
import pytest

from tf_dist.__main__ import main
from tf_dist.checkpoint import store


@pytest.fixture
def run(tmp_path):
    """A run folder with three checkpoints."""
    for step in (10, 20, 30):
        tensors = {
            "weights/0000/kernel": np.full((3, 2), step, np.float32),
            "optimizer/0000/iteration": np.int64(step),
        }
        tensors = {name: np.asarray(value) for name, value in tensors.items()}
        store.save(tmp_path / "checkpoints", step, tensors, {"tokens": 7 * step, "config": {"width": 2}})
    return tmp_path


def inject_nan(run, step):
    path = run / "checkpoints" / f"step-{step:08d}" / "shard-0000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("inside", ["", "checkpoints"])
def test_all_are_sound(run, inside, capsys):
    assert main(["checkpoint", "verify", str(run / inside)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[f"step-000000{n}0", "sound:"] for n in (1, 2, 3)]
    assert lines[0].endswith("2 tensors, 0.00 MB")


def test_one_is_damaged(run, capsys):
    inject_nan(run, 30)
    assert main(["checkpoint", "verify", str(run)]) == 77
    out = capsys.readouterr().out
    assert "step-00000020  sound" in out
    assert "step-00000030  damaged" in out and "'weights/0000/kernel' is damaged (CRC-32)" in out


def test_the_newest_sound_one_is_shown(run, capsys):
    inject_nan(run, 30)
    assert main(["checkpoint", "show", str(run)]) == 0
    out = capsys.readouterr().out
    assert "step-00000020: step 20, 2 tensors" in out and "tokens: 140" in out and "config: width 2" in out
    assert "format version 3: shard-0000.safetensors 0.00 MB\n" in out and "best" not in out
    (run / "checkpoints" / "best").write_text("step-00000020\n")
    assert main(["checkpoint", "show", str(run)]) == 0
    assert "2 tensors, 0.00 MB, the best by validation loss\n" in capsys.readouterr().out
    assert "weights/0000/kernel       float32  3x2" in out and "int64    scalar" in out


def test_a_damaged_one_is_not_shown(run, capsys):
    inject_nan(run, 30)
    assert main(["checkpoint", "show", str(run / "checkpoints" / "step-00000030")]) == 77
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["", "nothing", "step-00000040"])
def test_there_is_none(tmp_path, name, capsys):
    assert main(["checkpoint", "verify", str(tmp_path / name)]) == 77
    assert "there is no checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["checkpoint"], ["checkpoint", "mend", "x"], ["what"]])
def test_usage(words, capsys):
    assert main(words) == 64
    assert "usage: python -m tf_dist" in capsys.readouterr().err


def test_neither_tensorflow_nor_mpi_is_loaded(run):
    code = (
        "import sys; from tf_dist.__main__ import main; "
        f"code = main(['checkpoint', 'verify', {str(run)!r}]); "
        "sys.exit(code or bool({'tensorflow', 'keras', 'mpi4py.MPI'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
