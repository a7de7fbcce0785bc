"""Options of what a run shows, and how often; and of who watches it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError
from tf_dist.spelling import did_you_mean

option = partial(options.option, group="output")
REPORTS = ("tensorboard", "csv", "wandb", "mlflow")


@dataclass(frozen=True)
class OutputOptions(options.Options):
    """What is shown. Intervals in optimizer steps."""

    eval_every: int = option(100, text="steps between validations; 0: never", least=0)
    log_every: int = option(10, text="steps between progress lines", least=1, on_resume="free")
    report_to: str = option(
        "", text="also write metrics for: tensorboard,csv,wandb,mlflow", on_resume="free", metavar="NAMES"
    )
    early_stopping: str = option(
        "",
        text="METRIC:PATIENCE, as val_loss:3: end after so many validations without a better one",
        metavar="RULE",
    )
    callbacks: str = option(
        "",
        text="package.module:function, called with the configuration, returning Keras callbacks",
        names_code=True,
    )
    progress: str = option(
        "auto",
        text="plain lines, a bar (auto: if rank 0's output is a terminal), or nothing",
        choices=("auto", "plain", "bar", "none"),
        on_resume="of a start",
    )

    def check(self) -> None:
        """Refuse a report that nobody writes, and a rule that is none."""
        for name in self.reports:
            if name not in REPORTS:
                raise UsageError(
                    f"report_to is {self.report_to}: {name!r} is none of {', '.join(REPORTS)}"
                    + did_you_mean(name, REPORTS)
                )
        if self.early_stopping:
            self.stops_early_at()
        if self.callbacks and ":" not in self.callbacks:
            raise UsageError(f"callbacks is {self.callbacks}, not package.module:function")

    @property
    def reports(self) -> tuple[str, ...]:
        """Names of who gets a run's metrics."""
        return tuple(name.strip() for name in self.report_to.split(",") if name.strip())

    def stops_early_at(self) -> tuple[str, int]:
        """The metric that is watched, and after how many validations without a better one the run ends.

        Raises:
            UsageError: the rule is none.
        """
        metric, _, patience = self.early_stopping.partition(":")
        if not metric or not patience.isdecimal() or not int(patience):
            raise UsageError(f"early_stopping is {self.early_stopping!r}: METRIC:PATIENCE, as val_loss:3")
        if not self.eval_every:
            raise UsageError(f"early_stopping {self.early_stopping} with eval_every 0: nothing is validated")
        return metric, int(patience)
