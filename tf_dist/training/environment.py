"""What the last bits of a result depend on besides the configuration: a resume says which have changed."""

from __future__ import annotations

import os
from collections.abc import Mapping

from tf_dist.comm.agree import versions

# Of the packages that compute. Others may change without changing a bit.
COMPUTING = ("tensorflow", "tensorflow-cpu", "keras", "numpy")
# Instruction sets by which TensorFlow, oneDNN and NumPy choose their kernels.
KERNELS_BY = (
    "avx",
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "sve",
    "bf16",
)
# Of these, the ones that multiply bfloat16: two products where a float32 takes the place.
BFLOAT16_BY = ("avx512_bf16", "amx_bf16", "bf16")


def bits_depend_on() -> dict[str, str]:
    """Versions, threads, oneDNN, XLA and instruction sets of this process, by name."""
    found = {name: version for name, version in versions().items() if name in COMPUTING}
    return found | {
        "threads per rank": os.environ.get("TF_NUM_INTRAOP_THREADS", "all"),
        "oneDNN": "off" if os.environ.get("TF_ENABLE_ONEDNN_OPTS", "1") in ("0", "false") else "on",
        "XLA": os.environ.get("TF_XLA_FLAGS", "") or "off",
        "instruction sets": " ".join(_instruction_sets()),
    }


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """``name: before -> now`` for what differs, in the order of ``now``."""
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name}: {before.get(name, 'not there')} -> {now.get(name, 'not there')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def slow_bfloat16() -> str:
    """Why bfloat16 is not faster than float32 here; empty where it is, and where nobody knows."""
    found = bits_depend_on()
    sets = found["instruction sets"].split()
    if sets and not set(BFLOAT16_BY) & set(sets):
        return "this processor has no instructions for it (AVX512_BF16, AMX, or Arm's BF16)"
    return "oneDNN is off" if found["oneDNN"] == "off" else ""


def _instruction_sets() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            lines = [line for line in file if line.startswith(("flags", "Features"))]
    except OSError:  # no Linux
        return []
    there = set(lines[0].split()) if lines else set()
    return [name for name in KERNELS_BY if name in there]
