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
    source_column: str = option(
        "source", text="column with the input of translate, summarize ...", metavar="COLUMN"
    )
    target_column: str = option(
        "target", text="column with the text, or file, to be produced", metavar="COLUMN"
    )
    label_column: str = option("label", text="column with the label of classify", metavar="COLUMN")
    context_column: str = option("context", text="column with the text that answer reads", metavar="COLUMN")
    question_column: str = option("question", text="column with the question of answer", metavar="COLUMN")
    answer_column: str = option("answer", text="column with the answer", metavar="COLUMN")
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
