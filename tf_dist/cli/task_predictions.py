"""What ``generate`` does with the model of a task: a prediction for each prompt, instead of more text."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tf_dist import progress, terminal
from tf_dist.cli.run_flags import INPUT_COLUMNS, named_columns
from tf_dist.decoding.sampling import GREEDY
from tf_dist.errors import UsageError
from tf_dist.invocation import command
from tf_dist.tasks.registry import task_of

if TYPE_CHECKING:
    from tf_dist.data.records import Record
    from tf_dist.decoding.beam_search import BeamSearch
    from tf_dist.decoding.sampling import Sampling
    from tf_dist.run.load_run import LoadedRun
    from tf_dist.tasks.base import Task

RECORDINGS = "recordings"


def write_predictions(run: LoadedRun, flags: argparse.Namespace, chosen: Sampling | BeamSearch | None) -> int:
    """Print what the model predicts: of one prompt, the text; of several, a line of JSON each; the exit code.

    Args:
        run: whose task is not causal-lm.
        flags: of ``generate``.
        chosen: by flags; None: the most probable token.
    """
    from tf_dist.run.prepare_corpus import labels_of
    from tf_dist.run.task_predictor import TaskPredictor
    from tf_dist.run.task_prompts import predicted
    from tf_dist.runners.inference import WholeInference

    task = task_of(dataclasses.replace(run.config, **named_columns(flags, INPUT_COLUMNS)))
    records = _records(task, flags)
    predictor = TaskPredictor(task, run.tokenizer, labels_of(Path(flags.run_dir)), chosen or GREEDY)
    _check(task, flags, predictor.decodes, chosen)
    model = WholeInference(run.model, task.layout(run.tokenizer.vocab_size).words)
    one = not flags.prompts and len(flags.prompt) == 1
    made = predicted(
        task,
        run.tokenizer,
        predictor,
        model,
        records,
        1 if one else flags.batch,
        Path(flags.recordings or RECORDINGS),
    )
    with progress.task("predicting") as task_shown:
        for number, (given, text) in enumerate(made, 1):
            task_shown.done = number
            row = terminal.json_line({**given, "prediction": text})
            if not terminal.write(text if one else row):
                return terminal.CLOSED_PIPE
    return 0


def _records(task: Task, flags: argparse.Namespace) -> Iterable[Record]:
    from tf_dist.run.task_prompts import records_of_file, records_of_prompts

    if not task.of_tables:
        raise UsageError(
            f"the model in {flags.run_dir} was trained with --task {task.config.task}, and continues no "
            f"text. {command('evaluate')} judges it, and --init-from begins with its weights"
        )
    if flags.prompts:
        return records_of_file(task, Path(flags.prompts))
    if not flags.prompt:
        raise UsageError(
            f"--task {task.config.task} predicts something of a prompt: give --prompt or --prompts"
        )
    return records_of_prompts(task, flags.prompt)


def _check(
    task: Task, flags: argparse.Namespace, decodes: bool, chosen: Sampling | BeamSearch | None
) -> None:
    """Refuse flags that would change nothing."""
    if flags.tokens is not None:
        raise UsageError(
            f"--tokens: what --task {task.config.task} predicts ends by itself, or where its model has "
            "no more slots. Leave it out"
        )
    if chosen is not None and not decodes:
        raise UsageError(
            f"--task {task.config.task} predicts nothing token by token: leave out --beams and all about "
            "sampling"
        )
