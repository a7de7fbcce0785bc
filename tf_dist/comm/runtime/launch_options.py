"""Options of `tf_dist.connect`: what carries the bytes, and how many threads a rank has."""

from __future__ import annotations

from dataclasses import dataclass

from tf_dist.options import Options, option


@dataclass(frozen=True)
class BackendOptions(Options):
    """What carries the bytes between ranks."""

    backend: str = option("mpi", "strategy", "communication library", choices=("mpi", "horovod"))


@dataclass(frozen=True)
class ThreadOptions(Options):
    """How much of a node a rank has."""

    threads_per_rank: int = option(
        0,
        "performance",
        "TensorFlow threads per rank; 0: this rank's share of the node's cores",
        least=0,
        on_resume="free",
    )
