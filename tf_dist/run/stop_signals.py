"""Response to a stop signal: finish the step and save it, if there is time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING

from tf_dist import processes
from tf_dist.comm.runtime.launch import speak
from tf_dist.ops.supervisor import saved_step

if TYPE_CHECKING:
    from tf_dist.run.run_folder import RunFolder
    from tf_dist.training.trainer import Trainer


def finish(trainer: Trainer, run: RunFolder) -> Callable[[str], None]:
    """Handler for `Signals`, which calls it in a thread with the name of a signal."""

    def on_signal(name: str) -> None:
        trainer.request_stop()
        if trainer.comm.rank:
            return
        run.stopping(128 + signal.Signals[name])
        saved, doing = saved_step(run.path), "the step under way is finished and saved"
        above = processes.launcher_above(os.getpid())
        if above is not None and above.name in processes.MPIRUNS and name != "SIGUSR1":
            newest = f"step {saved} is saved, from which" if saved else "nothing is saved yet:"
            speak(
                f"told to end ({name}): {doing}, if mpirun leaves the time, about 0.2 s. If no more is said, "
                f"{newest} the same command resumes. `kill -USR1 {above.pid}`, or to start by `python -m "
                "tf_dist run`, leaves all the time it takes",
                past_mpirun=True,
            )
        else:
            speak(f"told to end ({name}): {doing}. Told again, the job ends at once")

    return on_signal
