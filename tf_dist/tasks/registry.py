"""Tasks by name, and those of users by ``package.module:Task``."""

from __future__ import annotations

import inspect

from tf_dist.config import Config
from tf_dist.config.data import PACKED
from tf_dist.errors import UsageError
from tf_dist.tasks.answer import Answer
from tf_dist.tasks.base import Task
from tf_dist.tasks.causal_lm import CausalLM
from tf_dist.tasks.classify import Classify
from tf_dist.tasks.masked_lm import MaskedLM
from tf_dist.tasks.media_to_text import Caption, Transcribe
from tf_dist.tasks.speak import Speak
from tf_dist.tasks.text_to_text import Summarize, Translate
from tf_dist.users_code import imported

TASKS: dict[str, type[Task]] = {
    one.name: one
    for one in (CausalLM, MaskedLM, Classify, Translate, Summarize, Answer, Transcribe, Speak, Caption)
}


def task_of(config: Config) -> Task:
    """The task of a run.

    Raises:
        UsageError: it cannot be found, or does not fit other options.
    """
    chosen = _users(config.task) if ":" in config.task else TASKS[config.task]
    task = chosen(config)
    if task.architecture not in task.architectures:
        raise UsageError(
            f"--architecture {task.architecture}: --task {config.task} is done with "
            f"{' or '.join(task.architectures)}"
        )
    if task.of_tables and config.documents == PACKED:
        raise UsageError(
            f"--documents packed is for running text; a row of --task {config.task} is one example. "
            "Leave it out"
        )
    if config.pointer_generator and not _points(task):
        raise UsageError(f"--pointer-generator: --task {config.task} makes no text of a text. Leave it out")
    if config.sequence_parallel > 1 and config.task != CausalLM.name:
        raise UsageError(
            f"--sequence-parallel {config.sequence_parallel}: the rows of --task {config.task} have masks, "
            "which context parallelism does not know. Use --tensor-parallel or --pipeline-parallel"
        )
    return task


def _points(task: Task) -> bool:
    """Whether a task copies tokens from its source: both are text, and its head says so."""
    return task.head(1).points and not task.source.width


def _users(name: str) -> type[Task]:
    found = imported(name, "--task")
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise UsageError(f"--task {name} is no class derived from tf_dist.tasks.base.Task")
    missing = [one for one in ("name", "roles", "architectures") if not hasattr(found, one)]
    if missing:
        raise UsageError(f"--task {name}: the class has no {', '.join(missing)} (tf_dist.tasks.base.Task)")
    return found
