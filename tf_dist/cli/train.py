"""Train a Keras language model on every MPI rank.

    tf-dist train                    # one process, built-in corpus
    mpirun -np 2 tf-dist train       # two ranks: same result, faster
    mpirun -np 2 tf-dist train --data tinyshakespeare --steps 2000
    mpirun -np 4 tf-dist train --config run.yaml --strategy master
    mpirun -np 2 tf-dist train --model mine:build --data 'books/*'
    mpirun -np 2 tf-dist train --run-dir runs/latest     # resume

A run folder holds config.yaml, metrics.jsonl, status.json, tokenizer.json, checkpoints/, logs/ and
loss.png. Rerun with the same --run-dir to resume; options not given come from its config.yaml.

Exit codes: 0 done, 64 usage, 65 bad data, 69 backend missing, 70 a rank failed, 71 out of
memory, 75 saved on a signal (rerun to resume), 76 not a number, 77 no usable checkpoint, 78 launch or
configuration error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tf_dist import progress, terminal
from tf_dist.comm.runtime import launch, thread_budget
from tf_dist.comm.runtime.consensus import agree, everywhere, on_root, versions
from tf_dist.comm.runtime.kernel_settings import settings
from tf_dist.config import Config
from tf_dist.config.data import PACKED
from tf_dist.config.pipeline import PipelineOptions
from tf_dist.data.registry import REGISTRY
from tf_dist.errors import UsageError
from tf_dist.flags import from_command_line, options_of_run, read_command_line, resolved
from tf_dist.invocation import program, spelled
from tf_dist.parallel.mesh import Mesh, data_ranks

if TYPE_CHECKING:
    from tf_dist.comm.runtime.signals import Signals
    from tf_dist.comm.transport.base import Comm
    from tf_dist.data.prepared_dataset import Prepared
    from tf_dist.run.job import Job
    from tf_dist.run.progress import ProgressDisplay, ShowSteps
    from tf_dist.run.reports import Reports
    from tf_dist.run.run_callbacks import LogRun, SavePeerCheckpoints, SaveRun
    from tf_dist.run.run_folder import Foreword, RunFolder
    from tf_dist.training.restart import Attempt
    from tf_dist.training.trainer import Trainer

LOG = logging.getLogger(__name__)
DEFAULT_STEPS = 400


def main(argv: list[str]) -> int:
    """Flags -> ranks -> data -> model -> training -> text; the exit code."""
    terminal.tolerate_any_text()
    if {"-h", "--help", "--print-config"} & set(argv):
        answer(argv)
    signals = launch.handle_stop_signals()
    comm = launch.join()
    config, of_run, dry = options(argv, comm)
    shown = progress.begin(config.progress, comm.rank == 0)
    launch.on_failure(lambda code, message: progress.end())
    agree(comm, {**config.as_dict(), **versions(), **settings()}, "the run")
    thread_budget.set_threads(comm, config.threads_per_rank)
    comm = launch.use_backend(comm, config.backend)

    check_task(config, comm)
    from tf_dist.run import init_from
    from tf_dist.run.prepare_corpus import newest_facts, shared_corpus
    from tf_dist.run.run_folder import Foreword, check_folder

    data_ranks(comm.size, *config.degrees)  # what does not fit is refused before anything is read
    on_root(comm, lambda: check_folder(config))
    launch.limit_stalls(config.stall_warn, config.stall_abort)
    foreword = Foreword(comm)
    if of_run:
        LOG.info(f"options that are not given here are those of {config.run_dir}/config.yaml")
    run_dir = Path(config.run_dir) if config.run_dir else None
    pinned = on_root(comm, lambda: init_from.pinned(config, newest_facts(config, run_dir)))
    config = dataclasses.replace(config, **pinned)
    corpus = shared_corpus(config, comm, REGISTRY, run_dir)
    if config.init_from:
        on_root(comm, lambda: init_from.check_tokenizer(config, corpus))
    config = sizes_of_data(config, corpus)
    with progress.task("loading TensorFlow"):
        thread_budget.load_tensorflow()  # only now: a mistake in the flags or the data was said at once
    from tf_dist.training.in_memory_checkpoint import PeerCheckpoints
    from tf_dist.training.restart import attempts

    peers = PeerCheckpoints()
    for attempt in attempts(comm, config.min_ranks, config.ranks_of_a_model, peers):
        with attempt.outlived():
            if dry:
                dry_run(config, corpus, attempt)
            else:
                train(config, corpus, foreword, signals, shown, attempt)
    return 0


def check_task(config: Config, comm: Comm) -> None:
    """Refuse a task that does not fit, or whose metrics need what is not installed; a collective.

    Raises:
        UsageError, BackendMissing: on every rank, before anything is prepared.
    """
    from tf_dist.metrics import named_metrics
    from tf_dist.run.reports import check_installed
    from tf_dist.tasks.registry import task_of

    everywhere(comm, lambda: named_metrics(task_of(config).metrics))
    on_root(comm, lambda: check_installed(config))


def run_of(config: Config, foreword: Foreword, comm: Comm) -> RunFolder:
    """The run folder, made as late as this: a start that fails leaves none."""
    from tf_dist.run.run_folder import RunFolder, choose_folder

    if foreword.run is not None:  # ranks have died, and the others begin again
        return foreword.run
    run = RunFolder(choose_folder(config, comm), comm)
    run.open(foreword)
    launch.on_failure(lambda code, message: failed(run, code, message))
    launch.limit_stalls(config.stall_warn, config.stall_abort, run.path / "logs")
    return run


def options(argv: list[str], comm: Comm) -> tuple[Config, bool, bool]:
    """What is asked for, whether some of it stands in the config.yaml of a run, and ``--dry-run``."""
    line = read_command_line(argv, spelled(__doc__ or ""), program("train"))
    # Read by rank 0: a node with a disk of its own has no such file.
    of_run = on_root(comm, lambda: options_of_run(line))
    return resolved(line, of_run), bool(of_run), line.dry_run


def failed(run: RunFolder, code: int, message: str) -> None:
    """Leave the terminal and the run folder so that they tell why."""
    progress.end()
    run.failed(code, message)


def answer(argv: list[str]) -> NoReturn:
    """Answer --help and --print-config, once, without MPI and TensorFlow."""
    launch.exit_above_rank_0()
    raise SystemExit(terminal.exit_code_of(lambda: _shown(argv)))


def _shown(argv: list[str]) -> int:
    config = from_command_line(argv, spelled(__doc__ or ""), program("train"))[0].as_yaml()
    return 0 if terminal.write(config, end="") else terminal.CLOSED_PIPE


def train(
    config: Config,
    corpus: Prepared,
    foreword: Foreword,
    signals: Signals,
    shown: str,
    attempt: Attempt,
) -> None:
    """Build model and trainer, resume, train, and leave text and a picture; on the ranks of an attempt."""
    from tf_dist.run import stop_signals
    from tf_dist.run.banner import banner
    from tf_dist.run.job import Job
    from tf_dist.run.progress import ShowSteps, display
    from tf_dist.run.task_data import TaskData, TaskMetrics
    from tf_dist.run.watchers import watchers_of
    from tf_dist.training.loss_spikes import Spike

    comm = attempt.ranks()
    if comm is None:  # a grid has no room for this rank, until others die
        return
    mesh = Mesh(comm, *config.degrees)
    data = TaskData(config, corpus)
    steps = planned_steps(config, len(data.rows("train")))
    trainer = trainer_for(config, mesh, steps, data.class_weights)
    run = run_of(config, foreword, comm)
    config = dataclasses.replace(config, run_dir=str(run.path))
    job = Job(config, comm, corpus, run, trainer, attempt.deaths)
    training, held_out = data.rows("train"), data.rows("val")
    if data.task.metrics and len(held_out):
        metrics = TaskMetrics(data, config.metric_rows)
        trainer.metrics.append(metrics)
        job.predicted = metrics.shown
    job.resume()
    with progress.task("trying how to compile the model"):
        trainer.tune()
    steps_per_epoch = trainer.sampler(training).steps_per_epoch
    run.say(banner(config, comm, corpus, trainer, steps, steps_per_epoch))
    signals.finish(stop_signals.finish(trainer, run))
    show = display(shown, steps, run.say)
    show_steps = ShowSteps(show, lambda: trainer.step)
    job.begin()
    more, reports = watchers_of(job)
    if job.early is not None and job.early.over:  # it has ended early before, and is started again
        steps = min(steps, trainer.step)

    with contextlib.closing(show_steps), contextlib.closing(reports):
        while True:
            try:
                trainer.fit(
                    training,
                    steps=steps,
                    validation=held_out if len(held_out) else None,
                    validation_bytes=data.text_bytes("val"),
                    eval_every=config.eval_every,
                    callbacks=[*callbacks_of(job, steps_per_epoch, show_steps, show, reports), *more],
                )
                break
            except Spike as spike:
                job.roll_back(spike)
    job.end(steps)


def callbacks_of(
    job: Job, steps_per_epoch: int, show_steps: ShowSteps, show: ProgressDisplay, reports: Reports
) -> list[LogRun | SaveRun | ShowSteps | SavePeerCheckpoints]:
    """The callbacks of one `Trainer.fit`: metrics, checkpoints, progress, peer checkpoints."""
    from tf_dist.run.run_callbacks import LogRun, SavePeerCheckpoints, SaveRun

    trainer, config, at_once = job.trainer, job.config, job.is_elsewhere

    def tell(row: dict[str, Any]) -> None:
        show(row)
        reports.row(row)

    return [
        LogRun(trainer, job.run, config.log_every, steps_per_epoch, job.record, tell, epochs_of_corpora(job)),
        SaveRun(trainer, config.save_every, job.save, job.finish, job.poll, job.saved, at_once),
        show_steps,
        SavePeerCheckpoints(trainer, config.replicate * job.keeps_copies, job.keep_copies),
    ]


def dry_run(config: Config, corpus: Prepared, attempt: Attempt) -> None:
    """All that precedes the first step, and some steps that nobody keeps; says time and memory."""
    from tf_dist.run.dry_run import measured
    from tf_dist.run.task_data import TaskData

    comm = attempt.ranks()
    if comm is None:
        return
    data = TaskData(config, corpus)
    steps = planned_steps(config, len(data.rows("train")))
    trainer = trainer_for(config, Mesh(comm, *config.degrees), steps, data.class_weights)
    with progress.task("trying how to compile the model"):
        trainer.tune()
    said = measured(trainer, data.rows("train"), steps)
    if comm.rank == 0:
        terminal.write(said)


def epochs_of_corpora(job: Job) -> Callable[[int], dict[str, float]]:
    """How often each corpus of a mixture was read after a step: the columns ``epoch_NAME``."""
    from tf_dist.data.mixture import mixture_of

    trainer = job.trainer
    mixture = mixture_of(job.corpus.rows("train", trainer.seq_len))

    def columns(step: int) -> dict[str, float]:
        rows = trainer.state.spikes.batch_of(step) * trainer.global_batch_size
        passes = {} if mixture is None else mixture.passes(rows)
        return {f"epoch_{name}": number for name, number in passes.items()}

    return columns


def trainer_for(config: Config, mesh: Mesh, steps: int, class_weights: Sequence[float] = ()) -> Trainer:
    """The model of a run, on its grid of ranks, and what trains it."""
    from tf_dist.models.fine_tuning import trained_parameters
    from tf_dist.models.model_outputs import LossTerms, with_class_weights, with_loss_terms
    from tf_dist.optim import optimizers
    from tf_dist.training.loss_spikes import LossSpikes
    from tf_dist.training.memory_estimate import check_room
    from tf_dist.training.model import model_for, words_of_a_row
    from tf_dist.training.preflight import agree_on_weights
    from tf_dist.training.trainer import Trainer

    model = with_class_weights(model_for(config, mesh), class_weights)
    with_loss_terms(model, LossTerms(config.label_smoothing, config.z_loss))
    agree_on_weights(model, mesh)
    check_room(model, config, mesh)
    if config.frozen:
        LOG.info("{:,} of {:,} parameters are trained".format(*trained_parameters(model)))
    return Trainer(
        model,
        optimizers.build(config, model, steps),
        mesh.all,
        config.chosen_strategy(),
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_rows,
        seq_len=words_of_a_row(config),
        clip_norm=config.clip_norm,
        seed=config.seed,
        check_every=config.check_every,
        on_mismatch=config.on_mismatch,
        allreduce=config.allreduce,
        autotune=config.autotune,
        xla=config.xla,
        overlap=config.overlap,
        chunk_bytes=config.chunk_bytes,
        mesh=mesh,
        min_ranks=config.min_ranks,
        max_bad_steps=config.max_bad_steps,
        spikes=LossSpikes(config.on_spike, config.spike_factor, config.spike_skip),
        pipeline=config.part(PipelineOptions),
    )


def planned_steps(config: Config, rows: int) -> int:
    """Optimizer steps of the whole run: --steps, or --epochs in steps, or 400."""
    if not config.epochs:
        return config.steps or DEFAULT_STEPS
    return config.epochs * -(-rows // config.global_batch_size)


def sizes_of_data(config: Config, corpus: Prepared) -> Config:
    """The run with the vocabulary and labels of its data and, for packed documents, their end of text.

    Raises:
        UsageError: another number of labels, or another end of text, was asked for.
    """
    labels = len(corpus.meta.get("labels", []))
    if config.classes not in (0, labels):
        raise UsageError(f"--classes {config.classes}: the data has {labels} labels. Leave --classes out")
    vocab_size, end = corpus.tokenizer.vocab_size, config.end_of_text
    if config.documents == PACKED:
        if end not in (-1, corpus.tokenizer.end_of_text):
            raise UsageError(
                f"--end-of-text {end}: documents end with {corpus.tokenizer.end_of_text} in this tokenizer. "
                "Leave --end-of-text out"
            )
        end = corpus.tokenizer.end_of_text
    return dataclasses.replace(config, vocab_size=vocab_size, classes=labels, end_of_text=end)
