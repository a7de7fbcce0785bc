"""Prompts of a task: what a trained model predicts for rows without a target.

Legend: B rows at once, W words of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tf_dist.data.prompt import read_prompts
from tf_dist.data.records import TABLES, Record, Records
from tf_dist.data.sources import kind_of
from tf_dist.data.tokenizer import UnknownCharacter
from tf_dist.data.tokens import Batch
from tf_dist.errors import DataError, UsageError
from tf_dist.run.speech import write_recordings
from tf_dist.tasks.base import Task, Values
from tf_dist.tasks.media_to_text import MediaToText
from tf_dist.tasks.speak import Speak

if TYPE_CHECKING:
    from tf_dist.data.tokenizer import Tokenizer
    from tf_dist.run.task_predictor import TaskPredictor
    from tf_dist.runners.inference import Inference

LOG = logging.getLogger(__name__)


def records_of_prompts(task: Task, prompts: Sequence[str], where: str = "--prompt") -> list[Record]:
    """A record of each prompt: a text, or the path of a file.

    Raises:
        UsageError: the task needs more than one cell.
    """
    if len(task.inputs) != 1:
        raise UsageError(
            f"--task {task.name} reads {' and '.join(task.inputs)}, and a prompt is one text. Give --prompts "
            f"FILE.jsonl with {', '.join(_columns(task).values())} in each line"
        )
    return [_record(task, text, where) for text in prompts]


def records_of_file(task: Task, path: Path) -> Iterable[Record]:
    """The records of a file: rows of a table, else a prompt in each line.

    Raises:
        DataError: it cannot be read, or a row lacks a cell; when it is read.
    """
    if kind_of(path) in TABLES:
        return Records([str(path)], _columns(task), errors=task.config.errors).read()
    return [
        record
        for line, text in read_prompts(path)
        for record in records_of_prompts(task, [text], f"{path}, line {line}")
    ]


def predicted(
    task: Task,
    tokenizer: Tokenizer,
    predictor: TaskPredictor,
    model: Inference,
    records: Iterable[Record],
    batch: int,
    recordings: Path,
) -> Iterator[tuple[Values, str]]:
    """The cells of each record with what is predicted for it, in their order, as it comes; on one rank.

    Args:
        task: of the run.
        tokenizer: of the run.
        predictor: of the task.
        model: of the run.
        records: with the cells of the task's `inputs`.
        batch: B; a last batch is filled up.
        recordings: folder for the sound of ``speak``, whose predictions are paths.

    Raises:
        DataError: a text that the tokenizer cannot encode, or a file that cannot be used, with its place.
        UsageError: ``batch`` is less than 1.
    """
    if batch < 1:
        raise UsageError(f"--batch is {batch}: at least one text at once")
    made, rest = 0, iter(records)
    while own := list(islice(rest, batch)):
        x_BxW = _rows(task, tokenizer, own)
        given = [record.values for record in own]
        if isinstance(task, Speak):
            layout = task.layout(tokenizer.vocab_size)
            names = write_recordings(model, task, layout, x_BxW, batch, recordings, made)
            texts = [str(recordings / name) for name in names]
        else:
            filled_BxW = np.concatenate([x_BxW, np.repeat(x_BxW[-1:], batch - len(own), axis=0)])
            texts = predictor.texts(predictor.of_rows(model, filled_BxW)[: len(own)], given)
        made += len(own)
        yield from zip(given, texts, strict=True)


def _columns(task: Task) -> dict[str, str]:
    return {role: name for role, name in task.columns().items() if role in task.inputs}


def _record(task: Task, text: str, where: str) -> Record:
    if not text.strip():
        raise DataError(f"{where} is empty: give at least a character")
    if isinstance(task, MediaToText):  # named by the user herself, so it may be anywhere
        return Record(where, Path(text).parent, {task.inputs[0]: Path(text).name})
    return Record(where, Path(), {task.inputs[0]: text})


def _rows(task: Task, tokenizer: Tokenizer, records: Sequence[Record]) -> Batch:
    """Rows with sources and empty targets, (B, W)."""
    layout, rows = task.layout(tokenizer.vocab_size), []
    for record in records:
        try:
            x_1xS, cut = task.sources([record], tokenizer)
        except UnknownCharacter as error:
            raise DataError(f"{record.where}: {error}") from error
        if cut:
            LOG.warning(
                f"{record.where}: its last {cut:,} are cut off: a source has {layout.source.count} slots"
            )
        rows.append(x_1xS)
    targets_BxT = np.full((len(rows), layout.target.words), layout.pad, np.int32)
    return np.concatenate([np.concatenate(rows), targets_BxT], axis=1)
