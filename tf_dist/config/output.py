"""Options of what a run shows, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options

option = partial(options.option, group="output")


@dataclass(frozen=True)
class OutputOptions(options.Options):
    """What is shown. Intervals in optimizer steps."""

    eval_every: int = option(100, text="steps between validations; 0: never", least=0)
    log_every: int = option(10, text="steps between progress lines", least=1, on_resume="free")
    progress: str = option(
        "auto",
        text="plain lines, a bar (auto: if rank 0's output is a terminal), or nothing",
        choices=("auto", "plain", "bar", "none"),
        on_resume="of a start",
    )
