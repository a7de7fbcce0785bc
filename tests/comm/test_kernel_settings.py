"""Variables by which libraries choose their kernels, and the ranks' word on which of them differ."""

import pytest

from tf_dist.comm.runtime.kernel_settings import same_environment, settings, told
from tf_dist.comm.transport.base import SerialComm
from tf_dist.errors import LaunchError


def test_variables_that_choose_kernels_are_found():
    found = settings({
        "TF_XLA_FLAGS": " --tf_xla_auto_jit=2   --tf_xla_cpu_global_jit ", "XLA_FLAGS": "",
        "ONEDNN_MAX_CPU_ISA": "SSE41", "ONEDNN_VERBOSE": "1", "NPY_DISABLE_CPU_FEATURES": "AVX2 AVX512F",
        "PATH": "/bin", "TF_CPP_MIN_LOG_LEVEL": "0", "CUDA_VISIBLE_DEVICES": "1",
    })  # fmt: skip
    assert found == {
        "TF_XLA_FLAGS": "--tf_xla_auto_jit=2 --tf_xla_cpu_global_jit",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "NPY_DISABLE_CPU_FEATURES": "AVX2 AVX512F",
        "TF_ENABLE_ONEDNN_OPTS": "1",
    }


@pytest.mark.parametrize(
    ("value", "on"), [(None, "1"), ("1", "1"), ("true", "1"), ("0", "0"), ("false", "0"), ("False", "0")]
)
def test_onednn_is_on_by_default(value, on):
    assert settings({} if value is None else {"TF_ENABLE_ONEDNN_OPTS": value})["TF_ENABLE_ONEDNN_OPTS"] == on


class Three(SerialComm):
    """Three ranks, of which the others have what the test says."""

    size = 3

    def __init__(self, **others):
        super().__init__()
        self.others = others

    def allgather_obj(self, value, what=""):
        asked = "threads per rank" in value
        theirs = {name: there for name, there in self.others.items() if (name == "threads per rank") is asked}
        return [value, value, value | theirs]


def test_what_differs_is_named_with_its_rank(monkeypatch):
    monkeypatch.delenv("TF_ENABLE_ONEDNN_OPTS", raising=False)
    assert same_environment(Three()) == []
    with pytest.raises(LaunchError, match="TF_ENABLE_ONEDNN_OPTS: 1 on ranks 0 1, 0 on rank 2") as caught:
        same_environment(Three(TF_ENABLE_ONEDNN_OPTS="0"))
    assert "environment" in str(caught.value)
    with pytest.raises(LaunchError, match="XLA_FLAGS: nothing on ranks 0 1, --fast on rank 2"):
        same_environment(Three(XLA_FLAGS="--fast"))


def test_unequal_machines_are_told_and_not_refused(monkeypatch):
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "4")
    lines = same_environment(Three(**{"threads per rank": "2"}))
    assert lines == ["threads per rank: 4 on ranks 0 1, 2 on rank 2"]
    assert "last bits" in told(lines) and told([]) == ""
