"""Options of speed: how sums travel, and what is compiled and timed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options

option = partial(options.option, group="performance")


@dataclass(frozen=True)
class PerformanceOptions(options.Options):
    """Speed. Sizes in bytes."""

    allreduce: str = option(
        "auto",
        text="all-reduce transport: shared-memory window, messages, or the faster one",
        choices=("auto", "window", "messages"),
    )
    chunk_bytes: int = option(
        0, text="chunk size of all-reduce by messages; 0: the fastest, measured at the start", least=0
    )
    overlap: str = option(
        "auto",
        text="overlap all-reduce with the backward pass: auto (if ranks span nodes), on, off",
        choices=("auto", "on", "off"),
    )
    autotune: str = option(
        "exact",
        text="what to time before the first step: only what changes no bit of the result, also whether XLA "
        "pays off (which changes bits), or nothing",
        choices=("exact", "full", "off"),
        on_resume="free",
    )
    xla: str = option(
        "auto",
        text="JIT-compile forward and backward with XLA; auto: keep the checkpoint's choice, else decide by "
        "--autotune",
        choices=("auto", "on", "off"),
    )
