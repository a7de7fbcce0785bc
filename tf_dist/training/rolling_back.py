"""Going back to an earlier checkpoint of a run that goes on, and data that is passed over from there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.atomic_io import sync_folder
from tf_dist.comm.agree import on_root
from tf_dist.errors import CheckpointError
from tf_dist.training import checkpoint, state
from tf_dist.training.spikes import BEFORE, Spike

if TYPE_CHECKING:
    from tf_dist.training.job import Job


def kept(facts: dict[str, Any]) -> dict[str, Any]:
    """What a job takes from the facts of a checkpoint; older ones do not have all of it."""
    none = {"bad_steps": [0, 0], "spikes": {}, "row": [0, 0, 0, 0], "last_row": {}}
    return {"val_loss": facts["val_loss"], **{name: facts.get(name, none[name]) for name in none}}


def roll_back(job: Job, spike: Spike) -> bool:
    """Go back to a checkpoint before a spike, and pass over the data from there on; a collective.

    Returns:
        Whether there was a checkpoint.

    Raises:
        NumericError: that was done too often.
    """
    trainer, run = job.trainer, job.run
    found = on_root(job.comm, lambda: _before(run.checkpoints, spike.step - BEFORE, run.say))
    if found is None:
        run.say(f"{spike}; there is no checkpoint of {BEFORE} steps before, so it goes on")
        return False
    job.neighbours.forget()
    state.restore(trainer, Path(found["path"]))
    step = trainer.step
    job.last["val_loss"], trainer.bad.counters = found["val_loss"], found["bad_steps"]
    job.tally.go_on_from(found["row"])
    count = trainer.spikes.go_back(spike.step, step, found["spikes"])
    on_root(job.comm, lambda: set_aside_after(run.checkpoints, step))
    run.drop_metrics_after(step)
    run.say(f"{spike}; back to step {step}, and {count} batches from there on are passed over")
    return True


def _before(folder: Path, step: int, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest sound checkpoint that is not beyond ``step``."""
    for path in reversed([path for path in checkpoint.listing(folder) if _step_of(path) <= step]):
        try:
            return {"path": str(path), **kept(checkpoint.verify(path)["facts"])}
        except CheckpointError as error:
            say(f"skipping {path.name}: {error}")
    return None


def set_aside_after(folder: Path, step: int, source: Path | None = None) -> int:
    """Rename checkpoints of the way that was left, so that nobody goes on from them; how many.

    Args:
        folder: that holds them.
        step: of later steps all are renamed.
        source: what is gone on from: another checkpoint of that very step is renamed as well. None: it stays.
    """
    found = [path for path in checkpoint.listing(folder) if _step_of(path) >= step]
    left = [path for path in found if _step_of(path) > step or (source is not None and path != source)]
    for path in left:
        os.rename(path, path.with_name(f"left-{path.name}-{secrets.token_hex(4)}"))
    sync_folder(folder)
    return len(left)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
