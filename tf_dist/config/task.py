"""Options of the task: what is learnt, from which columns, in how many slots."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from tf_dist import options
from tf_dist.errors import UsageError
from tf_dist.spelling import did_you_mean

TASKS = (
    "causal-lm",
    "masked-lm",
    "classify",
    "translate",
    "summarize",
    "answer",
    "transcribe",
    "speak",
    "caption",
)
ARCHITECTURES = ("decoder", "encoder", "prefix-decoder", "encoder-decoder")
option = partial(options.option, group="task")
column = partial(options.option, group="columns of tables", metavar="COLUMN")


@dataclass(frozen=True)
class TaskOptions(options.Options):
    """The task. Lengths in slots: tokens of text, vectors of frames or patches."""

    task: str = option(
        "causal-lm",
        text=f"{', '.join(TASKS)}, or package.module:Task",
        metavar="TASK",
        on_resume="same",
        names_code=True,
    )
    architecture: str = option(
        "",
        text=f"of the model: {', '.join(ARCHITECTURES)}; empty: the one that the task is mostly done with",
        choices=("", *ARCHITECTURES),
        on_resume="same",
    )
    source_column: str = column("source", text="column with the input of translate, summarize ...")
    target_column: str = column("target", text="column with the text, or file, to be produced")
    label_column: str = column("label", text="column with the label of classify")
    context_column: str = column("context", text="column with the text that answer reads")
    question_column: str = column("question", text="column with the question of answer")
    answer_column: str = column("answer", text="column with the answer")
    start_column: str = column(
        "",
        text="column with the character of the context where an answer begins; empty: its first occurrence",
    )
    source_len: int = option(0, text="slots of the source; 0: --seq-len", least=0, on_resume="same")
    target_len: int = option(0, text="slots of the target; 0: --seq-len", least=0, on_resume="same")
    classes: int = option(0, text="number of labels; 0: as many as the data has", least=0, on_resume="same")
    class_weights: str = option(
        "none",
        text="of classify, in the loss of training: none, or balanced: each label weighs the same in all",
        choices=("none", "balanced"),
    )
    metric_rows: int = option(
        256, text="validation rows that are decoded for metrics while training; 0: all", least=0
    )

    def check(self) -> None:
        """Refuse a task that nobody knows."""
        if ":" not in self.task and self.task not in TASKS:
            raise UsageError(
                f"unknown task {self.task!r}: {', '.join(TASKS)} or package.module:Task"
                + did_you_mean(self.task, TASKS)
            )
