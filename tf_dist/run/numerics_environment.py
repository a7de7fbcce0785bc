"""What the last bits of a result depend on besides the configuration; a resume reports changes."""

from __future__ import annotations

from collections.abc import Mapping

from tf_dist.comm.runtime.consensus import difference, versions
from tf_dist.comm.runtime.kernel_settings import ONEDNN, settings, threads
from tf_dist.comm.transport.base import Comm

# Packages that compute; others cannot change a bit.
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
# Those of them that multiply bfloat16, twice as many numbers at once as float32.
BFLOAT16_BY = ("avx512_bf16", "amx_bf16", "bf16")


def bits_depend_on() -> dict[str, str]:
    """Versions, threads, oneDNN, XLA and instruction sets of this process, by name."""
    found = {name: version for name, version in versions().items() if name in COMPUTING}
    chosen = settings()
    return found | {
        **threads(),
        "oneDNN": "off" if chosen.pop(ONEDNN) == "0" else "on",
        "XLA": chosen.pop("TF_XLA_FLAGS", "off"),
        **chosen,
        "instruction sets": " ".join(_instruction_sets()),
    }


def bits_of_all(comm: Comm) -> dict[str, str]:
    """`bits_depend_on` of all ranks; values that differ come with their ranks. A collective."""
    everyone = comm.allgather_obj(bits_depend_on())
    names = dict.fromkeys(name for found in everyone for name in found)
    return {name: _of_all([found.get(name, "nothing") for found in everyone]) for name in names}


def _of_all(values: list[str]) -> str:
    return difference("", values).removeprefix(": ") or values[0]


def changes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """``name: before -> now`` for each difference, in the order of ``now``."""
    names = [*now, *(name for name in before if name not in now)]
    return [
        f"{name}: {before.get(name, 'not there')} -> {now.get(name, 'not there')}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def slow_bfloat16() -> str:
    """Why bfloat16 is not faster than float32 here; empty if it is, or if that is unknown."""
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
