"""Options of checkpoints, and of what is done where ranks die."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options

option = partial(options.option, group="checkpoints and recovery", on_resume="free")


@dataclass(frozen=True)
class RecoveryOptions(options.Options):
    """Ranks that die while the others go on."""

    min_ranks: int = option(
        1,
        text="with fault tolerance (mpirun --with-ft ulfm): end the run if fewer ranks survive",
        least=1,
    )
    replicate: int = option(
        0,
        text="steps between peer (buddy) copies of each rank's state in memory, for recovery where a step "
        "cannot be finished without a rank (ZeRO, master, grids); 0: checkpoints only",
        least=0,
    )


@dataclass(frozen=True)
class CheckpointOptions(options.Options):
    """The run folder and its checkpoints."""

    run_dir: str = option(
        "", text="run folder; empty: a new one under runs/", metavar="FOLDER", on_resume="of a start"
    )
    resume: str = option(
        "auto",
        text="auto: resume from the newest checkpoint of the run folder; never: start from scratch, older "
        "files are moved aside; or the path of a run folder or checkpoint",
        metavar="auto|never|PATH",
        on_resume="of a start",
    )
    save_every: int = option(200, text="steps between checkpoints; 0: only at the end", least=0)
    async_save: str = option(
        "on",
        text="write checkpoints in the background; off: block until they are on disk",
        choices=("on", "off"),
    )
    keep: int = option(3, text="number of newest checkpoints to keep", least=1)
