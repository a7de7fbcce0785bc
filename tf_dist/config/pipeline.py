"""Options of a pipeline: its schedule, its cuts, and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError
from tf_dist.parallel.pipeline_schedules import Instruction, chunks_of, schedule

option = partial(options.option, group="parallelism", on_resume="free")


@dataclass(frozen=True)
class PipelineOptions(options.Options):
    """How a model is run by a pipeline.

    Attributes:
        pipeline_schedule: see `tf_dist.parallel.pipeline_schedules.schedule`.
        pipeline_cuts: layers with which stages begin, as in "2,4"; empty: stages of equal cost.
        virtual_stages: stages of each rank, with the interleaved schedule.
        micro_batches_in_flight: of which a rank keeps activations at most; 0: as the schedule has it.
        recompute: "on": keep a stage's input only, and compute the rest again on the way back.
    """

    pipeline_schedule: str = option(
        "1f1b",
        text="pipeline schedule: order of forward and backward passes of micro-batches",
        choices=("gpipe", "1f1b", "interleaved", "zero-bubble"),
    )
    pipeline_cuts: str = option(
        "",
        text="first layer of each stage after the first, as in 2,4; empty: stages of equal cost",
        metavar="LAYERS",
    )
    virtual_stages: int = option(2, text="stages per rank with the interleaved schedule", least=2)
    micro_batches_in_flight: int = option(
        0,
        text="maximum micro-batches whose activations a pipeline rank keeps; 0: as the schedule needs",
        least=0,
    )
    recompute: str = option(
        "off",
        text="activation checkpointing: recompute a pipeline stage's activations in the backward pass",
        choices=("on", "off"),
    )

    def streams(self, ranks: int, micro_batches: int) -> list[list[Instruction]]:
        """What each rank computes in a step, (p,)."""
        limit = self.micro_batches_in_flight
        return schedule(self.pipeline_schedule, ranks, micro_batches, self.virtual_stages, limit)

    def chunks(self, ranks: int) -> int:
        """Into how many segments the model is cut."""
        return chunks_of(self.pipeline_schedule, ranks, self.virtual_stages)

    def check_stages(self, ranks: int, layers: int, known: bool) -> None:
        """Refuse more stages than layers.

        Args:
            ranks: of the pipeline.
            layers: of the model.
            known: whether ``layers`` says how deep it is; of a user's model only the graph tells.

        Raises:
            UsageError: with what would do.
        """
        interleaved = self.pipeline_schedule == "interleaved"
        each = self.virtual_stages if interleaved else 1
        self._check_cuts(ranks * each)
        if not known or ranks * each <= layers:
            return
        stages = f"pipeline_parallel {ranks}"
        if interleaved:
            stages += f" x virtual_stages {each} = {ranks * each} stages"
        fits = (
            f"pipeline_parallel at most {layers // each}" if layers >= each else "another pipeline_schedule"
        )
        raise UsageError(
            f"{stages} is more than layers {layers}: each stage needs one. Use {fits}, or layers "
            f"{ranks * each} or more"
        )

    def _check_cuts(self, stages: int) -> None:
        """Whether there are as many numbers as cuts; which of them can be had, the model's graph tells."""
        text = self.pipeline_cuts
        cuts = [word.strip() for word in text.split(",")] if text else []
        if cuts and not (all(map(str.isdecimal, cuts)) and len(cuts) == stages - 1):
            raise UsageError(
                f"pipeline_cuts {text!r}: {stages - 1} layers with which a stage begins are needed for "
                f"{stages} stages, as in {','.join(map(str, range(1, stages)))}"
            )
