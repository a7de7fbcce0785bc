"""Evaluate a trained model on held-out text or rows: loss, and the metrics of its task.

    tf-dist evaluate               # the newest run, its held-out text
    mpirun -np 2 tf-dist evaluate --run-dir runs/one     # faster
    tf-dist evaluate --run-dir runs/one --data other.txt
    tf-dist evaluate --data reviews.csv --text-column body
    tf-dist evaluate --predictions out.jsonl   # of each row of a task

Text is tokenized by the run's own tokenizer. The default is the text that training held out, even if the
files have changed since.

The last line is JSON. Exit codes: those of a training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tf_dist import progress, terminal
from tf_dist.cli.run_flags import COLUMNS, add_column_flags, add_run_flags, named_columns
from tf_dist.comm.runtime import launch, thread_budget
from tf_dist.comm.runtime.log_handlers import shown_by
from tf_dist.data.registry import REGISTRY
from tf_dist.decoding.beam_search import BeamSearch
from tf_dist.decoding.sampling import GREEDY
from tf_dist.errors import DataError, UsageError
from tf_dist.flags import Parser
from tf_dist.invocation import program, spelled

if TYPE_CHECKING:
    from tf_dist.data.prepared_dataset import Prepared
    from tf_dist.run.task_data import TaskData
    from tf_dist.training.trainer import Trainer


def main(argv: list[str]) -> int:
    """Read the run, prepare the text, evaluate on all ranks; the exit code."""
    terminal.tolerate_any_text()
    if {"-h", "--help"} & set(argv):
        launch.exit_above_rank_0()
        parse(argv)
    comm = launch.join()
    flags = checked(parse(argv))
    thread_budget.set_threads(comm)
    progress.begin(flags.progress, comm.rank == 0)
    with progress.task("loading TensorFlow"):
        thread_budget.load_tensorflow()

    from tf_dist.optim import optimizers
    from tf_dist.run.load_run import load_run
    from tf_dist.run.prepare_corpus import corpus_of_run, other_corpus
    from tf_dist.run.task_data import TaskData
    from tf_dist.training.model import words_of_a_row
    from tf_dist.training.trainer import Trainer

    with progress.task("reading the checkpoint"), shown_by(terminal.write):
        run = load_run(flags.run_dir, flags.checkpoint, flags.model, flags.task)
    config = dataclasses.replace(run.config, prepared_dir=flags.prepared_dir or run.config.prepared_dir)
    folder = Path(flags.run_dir)
    if flags.data:
        config = dataclasses.replace(
            config,
            data=tuple(flags.data),
            errors=flags.errors or config.errors,
            **named_columns(flags, COLUMNS),
        )
        with shown_by(lambda line: None):  # what is prepared is known by its result
            corpus = other_corpus(config, comm, REGISTRY, folder)
    else:
        with shown_by(terminal.write):
            corpus = corpus_of_run(config, run.content_sha256, comm, REGISTRY, folder)
    more = {} if flags.length_penalty is None else {"length_penalty": flags.length_penalty}
    data = TaskData(config, corpus, BeamSearch(flags.beams, **more) if flags.beams else GREEDY)
    side = "train" if flags.data and not data.task.of_tables else "val"
    if corpus.meta["tokens"][side] < 2:
        raise DataError(
            f"{'that text' if flags.data else 'the held-out text of the run'} has no two tokens: "
            + ("give more text" if flags.data else "it was trained with --val-fraction 0. Use --data FILE")
        )
    trainer = Trainer(
        run.model,
        optimizers.build(config, run.model, 1),
        comm,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_rows,
        seq_len=words_of_a_row(config),
    )
    result = judged(trainer, data, side, flags.predictions)
    if comm.rank == 0:
        what = " ".join(flags.data) if flags.data else "the held-out text of the run"
        terminal.write(f"step {run.step}, {what}: {amount(corpus, side)}")
        terminal.write(json.dumps({"step": run.step, **result}))
    return 0


def checked(flags: argparse.Namespace) -> argparse.Namespace:
    """The flags.

    Raises:
        UsageError: columns are named of no table.
    """
    if not flags.data and (named := list(named_columns(flags, COLUMNS))):
        flag = "--" + named[0].replace("_", "-")
        raise UsageError(f"{flag} is of a table in --data, and there is none. Leave it out, or give --data")
    return flags


def amount(corpus: Prepared, side: str) -> str:
    """How much there is on a side of the split."""
    rows = corpus.meta.get("rows")
    return f"{rows[side]:,} rows" if rows else f"{corpus.meta['tokens'][side]:,} tokens"


def judged(trainer: Trainer, data: TaskData, side: str, predictions: str | None) -> dict[str, float]:
    """The loss and metrics of a side's rows; what is predicted goes to a file; a collective.

    Raises:
        UsageError: predictions of running text are wanted.
    """
    from tf_dist.run.predictions_file import write_predictions
    from tf_dist.run.task_data import TaskMetrics
    from tf_dist.tasks.masked_lm import MaskedLM

    rows, metrics = data.rows(side), None
    if data.task.of_tables:
        metrics = TaskMetrics(data, 0)
        trainer.metrics.append(metrics)
    elif data.task.name == MaskedLM.name and not predictions:
        trainer.metrics.append(data.pseudo_perplexity(side))
    elif predictions:
        raise UsageError("--predictions are of the rows of a task; running text has none. Leave it out")
    result = trainer.validate(rows, data.text_bytes(side))
    if predictions and metrics and trainer.comm.rank == 0:
        write_predictions(Path(predictions), metrics.rows(trainer.runner, rows, Path(predictions)))
    return result


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags."""
    parser = Parser(spelled(__doc__ or ""), "[--run-dir FOLDER] [--data PATH] [options]", program("evaluate"))
    add_run_flags(parser)
    parser.add_argument("--data", nargs="+", metavar="SOURCE", help="other text to evaluate on, all of it")
    add_column_flags(parser, COLUMNS, "--data")
    parser.add_argument(
        "--errors",
        choices=("strict", "replace"),
        help="bytes of --data that are not UTF-8: stop, or U+FFFD [as in training]",
    )
    parser.add_argument(
        "--beams", type=int, metavar="N", default=0, help="predict texts by beam search with N beams [greedy]"
    )
    parser.add_argument(
        "--length-penalty", type=float, metavar="X", help="of beam search, as in generate [0.6]"
    )
    parser.add_argument(
        "--predictions", metavar="FILE", help="write what is predicted for each row of a task, as JSON lines"
    )
    parser.add_argument(
        "--prepared-dir", metavar="FOLDER", help="cache folder of tokenized data [as in training]"
    )
    parser.add_argument("--progress", choices=progress.KINDS, default="auto", help=progress.HELP)
    return parser.parse_args(argv)
