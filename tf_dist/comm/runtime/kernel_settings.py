"""Environment variables that change a rank's results, because libraries choose their kernels by them.

TensorFlow reads some when it is imported and others when it first compiles something, so ranks compare them
when they connect, and once more before their first step.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from tf_dist.comm.runtime.consensus import agree, difference, versions
from tf_dist.comm.transport.base import Comm

# oneDNN, XLA, determinism, mixed precision and TF32 in TensorFlow; BLAS; NumPy; the C library's exp and tanh.
PREFIXES = ("ONEDNN_", "DNNL_", "TF_ONEDNN_", "XLA_", "TF_XLA_", "TF_ENABLE_", "TF_DETERMINISTIC",
            "TF_CUDNN_", "TF_DISABLE_", "NVIDIA_TF32", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS",
            "MKL_DEBUG_CPU_TYPE", "OPENBLAS_CORETYPE",
            "NPY_DISABLE_", "NPY_ENABLE_", "GLIBC_TUNABLES")  # fmt: skip
# Of these, the ones that change logging or profiling, but no results.
HARMLESS = ("ONEDNN_VERBOSE", "DNNL_VERBOSE", "ONEDNN_JIT_PROFILE", "ONEDNN_JIT_DUMP", "DNNL_JIT_DUMP",
            "DNNL_JIT_PROFILE", "TF_XLA_LOG", "TF_ENABLE_GPU_GARBAGE_COLLECTION")  # fmt: skip
ONEDNN = "TF_ENABLE_ONEDNN_OPTS"


def settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The kernel-selecting variables that are set, by name; oneDNN always, as it is on by default."""
    found = {
        name: " ".join(value.split())
        for name, value in sorted(environment.items())
        if name.startswith(PREFIXES) and not name.startswith(HARMLESS) and value.strip()
    }
    return found | {ONEDNN: "0" if found.get(ONEDNN, "1").lower() in ("0", "false") else "1"}


def threads() -> dict[str, str]:
    """Facts that differ between ranks of unequal machines, and may change the last bits of a sum."""
    return {"threads per rank": os.environ.get("TF_NUM_INTRAOP_THREADS", "all")}


def same_environment(comm: Comm) -> list[str]:
    """Compare versions and kernel-selecting variables between all ranks; a collective.

    Returns:
        A line for each permitted difference: ``threads per rank: 1 on rank 0, 2 on rank 1``.

    Raises:
        LaunchError: on every rank; lists each version and variable that differs, with its ranks.
    """
    agree(comm, versions() | settings(), "the versions and settings of what they compute with")
    everyone = comm.allgather_obj(threads())
    lines = [difference(name, [there[name] for there in everyone]) for name in everyone[0]]
    return [line for line in lines if line]


def told(lines: list[str]) -> str:
    """Message for these lines; empty if there are none."""
    if not lines:
        return ""
    return f"warning: {'; '.join(lines)}. The last bits of results may depend on it (--threads-per-rank N)"
