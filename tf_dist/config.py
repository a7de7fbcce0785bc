"""What a training run is: one frozen dataclass, and everything derived from its fields.

The flags of ``tf-dist train``, the keys of a YAML file, the validation and ``--print-config`` all
come from the fields of `Config`, so a new option is one new field; ``flags.py`` reads them. Nothing
here imports TensorFlow or MPI: ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tf_dist.choices import check_limits, check_update
from tf_dist.degrees import check_degrees
from tf_dist.errors import UsageError

# Tokens of a BPE vocabulary where no number is given.
BPE_DEFAULT_VOCAB = 2048


def option(
    default: Any, group: str, text: str, *, choices: tuple[str, ...] = (), least: float | None = None
) -> Any:
    """Declare one option: its default, the heading it stands under in ``--help``, and what it means."""
    metadata = {"group": group, "text": text, "choices": choices, "least": least}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """One run. Units: sizes in rows or tokens, rates per optimizer step, names as in the field.

    Raises:
        UsageError: a value is out of range, or two values cannot hold together.
    """

    # fmt: off
    data: tuple[str, ...] = option(("stdlib",), "data", "files, globs, folders, a name of data/datasets.yaml, or `stdlib`: the Python standard library's own sources")  # noqa: E501
    text_column: str = option("text", "data", "the column that holds the text in .csv .tsv .jsonl .parquet")
    tokenizer: str = option("bpe", "data", "byte, char, bpe (trained on the corpus), or the path of a tokenizer.json")  # noqa: E501
    vocab_size: int = option(0, "data", "tokens in the vocabulary; 0: as many as needed (bpe: 2048)", least=0)
    val_fraction: float = option(0.1, "data", "share of the text kept for validation, split by document", least=0)  # noqa: E501
    errors: str = option("strict", "data", "bytes that are not UTF-8: stop there, or replace and count them", choices=("strict", "replace"))  # noqa: E501
    max_bytes: int = option(4_000_000, "data", "use at most this much of the stdlib corpus; 0: all of it", least=0)  # noqa: E501
    prepared_dir: str = option("data/prepared", "data", "where prepared tokens are kept and found again")

    model: str = option("transformer", "model", "transformer, lstm, or package.module:function, called with the configuration, returning a keras.Model")  # noqa: E501
    layers: int = option(4, "model", "number of layers", least=1)
    width: int = option(128, "model", "width of the residual stream, or units of each LSTM layer", least=1)
    heads: int = option(4, "model", "attention heads; must divide the width", least=1)
    seq_len: int = option(64, "model", "tokens in a sequence", least=1)
    dropout: float = option(0.0, "model", "share of activations dropped in training", least=0)
    tie_embeddings: bool = option(True, "model", "use the embedding matrix again as the output layer")
    precision: str = option("float32", "model", "what the model computes in; weights, optimizer, loss and sums stay float32", choices=("float32", "bfloat16"))  # noqa: E501

    global_batch_size: int = option(32, "batch and steps", "sequences in one optimizer step, over all ranks", least=1)  # noqa: E501
    micro_batch_size: int = option(0, "batch and steps", "sequences in one forward and backward pass; must divide the global batch; 0: chosen, see the banner", least=0)  # noqa: E501
    steps: int = option(0, "batch and steps", "optimizer steps; 0: as many as the epochs take, or 400", least=0)  # noqa: E501
    epochs: int = option(0, "batch and steps", "passes over the training data, when steps is 0", least=0)
    seed: int = option(1, "batch and steps", "of the split, the order, the initial weights and dropout", least=0)  # noqa: E501

    optimizer: str = option("adamw", "optimizer", "the name of a Keras optimizer: adam, adamw, sgd, lion, ...")  # noqa: E501
    optimizer_args: dict[str, Any] = option({}, "optimizer", "more arguments for it, as in beta_2=0.99,epsilon=1e-8")  # noqa: E501
    learning_rate: float = option(1e-3, "optimizer", "the peak learning rate", least=0)
    min_learning_rate: float = option(1e-4, "optimizer", "where linear, cosine and 1cycle end", least=0)
    schedule: str = option("cosine", "optimizer", "how the learning rate falls after the warm-up", choices=("constant", "linear", "cosine", "1cycle"))  # noqa: E501
    warmup_steps: int = option(20, "optimizer", "steps of linear growth from 0 to the peak", least=0)
    weight_decay: float = option(0.1, "optimizer", "decoupled decay of matrices (not of biases and gains)", least=0)  # noqa: E501
    clip_norm: float = option(1.0, "optimizer", "largest global norm of the mean gradient; 0: no clipping", least=0)  # noqa: E501
    on_spike: str = option("off", "checks", "when the training loss jumps: nothing, warn, or roll back to a checkpoint before and pass over the batches from there on", choices=("off", "warn", "rollback"))  # noqa: E501
    spike_factor: float = option(10.0, "checks", "a jump: so many times the spread of the last 64 losses above their median", least=0)  # noqa: E501
    spike_skip: int = option(100, "checks", "batches that are passed over after that of a jump", least=0)
    max_bad_steps: int = option(10, "checks", "steps in a row that are skipped because a gradient is not finite; the next one ends the run. 0: the first one does", least=0)  # noqa: E501

    tensor_parallel: int = option(1, "parallelism", "ranks that share every layer: heads, units and vocabulary are divided among them", least=1)  # noqa: E501
    pipeline_parallel: int = option(1, "parallelism", "ranks that share the layers, one after another", least=1)  # noqa: E501
    sequence_parallel: int = option(1, "parallelism", "ranks that share the tokens of a sequence (transformer)", least=1)  # noqa: E501
    pipeline_schedule: str = option("1f1b", "parallelism", "in which order a pipeline's ranks take micro-batches forward and backward", choices=("gpipe", "1f1b", "interleaved", "zero-bubble"))  # noqa: E501
    pipeline_cuts: str = option("", "parallelism", "layers with which a stage begins, as in 2,4; empty: stages of equal cost")  # noqa: E501
    virtual_stages: int = option(2, "parallelism", "stages of each rank with the interleaved schedule", least=2)  # noqa: E501
    micro_batches_in_flight: int = option(0, "parallelism", "micro-batches whose activations a pipeline's rank keeps at most; 0: as the schedule has it", least=0)  # noqa: E501
    recompute: str = option("off", "parallelism", "compute a pipeline stage's activations again on the way back, instead of keeping them", choices=("on", "off"))  # noqa: E501

    update: str = option("allreduce", "strategy", "how gradients become new weights, the same everywhere or until ranks meet", choices=("allreduce", "master", "zero", "local-sgd", "diloco", "downpour", "easgd", "gossip"))  # noqa: E501
    zero_stage: int = option(1, "strategy", "what --update zero divides among the data-parallel ranks: 1 optimizer state, 2 also gradients, 3 also weights", least=1)  # noqa: E501
    staleness: int = option(1, "Downpour", "global batches by which the fastest worker of update downpour may lead the slowest; 0: as allreduce, bit for bit", least=0)  # noqa: E501
    staleness_aware: str = option("off", "Downpour", "divide the learning rate of a gradient of update downpour by its staleness", choices=("on", "off"))  # noqa: E501
    master_trains: str = option("off", "Downpour", "whether the master of update downpour or easgd also computes gradients", choices=("on", "off"))  # noqa: E501
    sync_every: int = option(0, "local SGD and DiLoCo", "steps that a rank takes by itself between exchanges; 0: local-sgd 8, diloco 50, easgd 4, gossip 1", least=0)  # noqa: E501
    elastic_force: float = option(0.0, "EASGD and gossip", "how far worker and centre of update easgd move towards each other, as a part of their distance; 0: 0.9 / workers", least=0)  # noqa: E501
    sync_warmup_steps: int = option(0, "local SGD and DiLoCo", "synchronous steps before the first that ranks take by themselves", least=0)  # noqa: E501
    outer_lr: float = option(0.7, "local SGD and DiLoCo", "learning rate of the outer steps of update diloco", least=0)  # noqa: E501
    outer_momentum: float = option(0.9, "local SGD and DiLoCo", "Nesterov momentum of the outer steps of update diloco", least=0)  # noqa: E501
    outer_fragments: int = option(1, "local SGD and DiLoCo", "parts of the weights that meet at steps of their own, so that less travels at once", least=1)  # noqa: E501
    outer_precision: str = option("float32", "local SGD and DiLoCo", "in which changes of weights travel at meetings", choices=("float32", "bfloat16"))  # noqa: E501
    outer_delay: int = option(0, "local SGD and DiLoCo", "steps that ranks take while changes of weights travel, which they do not wait for then", least=0)  # noqa: E501
    compression: str = option("none", "compression", "how gradients are compressed before they are summed, with update allreduce; what is not sent waits for the next step", choices=("none", "bf16", "topk", "powersgd", "onebit"))  # noqa: E501
    compression_rank: int = option(4, "compression", "rank of the matrices of compression powersgd", least=1)
    compression_least_rate: float = option(2.0, "compression", "how many times smaller powersgd must make a matrix; else it travels whole", least=1)  # noqa: E501
    compression_density: float = option(0.01, "compression", "share of the elements that compression topk sends", least=0)  # noqa: E501
    compression_momentum: float = option(0.0, "compression", "momentum of each rank's gradients before topk (DGC); use it with optimizer sgd", least=0)  # noqa: E501
    compression_start: int = option(0, "compression", "first steps whose gradients are summed whole", least=0)
    backend: str = option("mpi", "strategy", "who carries the bytes", choices=("mpi", "horovod"))
    allreduce: str = option("auto", "performance", "what carries the sums of gradients: a shared window, messages, or what is faster", choices=("auto", "window", "messages"))  # noqa: E501
    chunk_bytes: int = option(0, "performance", "pieces in which sums travel between ranks by messages; 0: what is faster, measured at the start", least=0)  # noqa: E501
    overlap: str = option("auto", "performance", "let gradients leave during the backward pass: auto (where ranks span nodes), on, off", choices=("auto", "on", "off"))  # noqa: E501
    autotune: str = option("exact", "performance", "what is timed before the first step: what changes no bit of the result, fully (also whether XLA compiles the model: other bits), or nothing", choices=("exact", "full", "off"))  # noqa: E501
    xla: str = option("auto", "performance", "compile forward and backward by XLA: on, off, or as autotune or the checkpoint has it", choices=("auto", "on", "off"))  # noqa: E501
    check_every: int = option(100, "checks", "steps between comparisons of all ranks' weights and optimizers, bit for bit; 0: only in the first steps", least=0)  # noqa: E501
    on_mismatch: str = option("stop", "checks", "when a rank differs: stop, or restore it from a majority of the others", choices=("stop", "restore"))  # noqa: E501
    min_ranks: int = option(1, "checkpoints and recovery", "where ranks may die and the others go on (mpirun --with-ft ulfm): with fewer the run ends", least=1)  # noqa: E501
    replicate: int = option(0, "checkpoints and recovery", "where ranks may die and a step cannot be finished without them (ZeRO, master, grids): steps between copies in memory of what each rank has, at another one; 0: checkpoints do", least=0)  # noqa: E501
    stall_warn: float = option(60.0, "checkpoints and recovery", "seconds that ranks wait for another one before they name it, and say what it does; 0: never", least=0)  # noqa: E501
    stall_abort: float = option(600.0, "checkpoints and recovery", "seconds after which they end the job, with 70; 0: never. A rank that still prepares or compiles is given time", least=0)  # noqa: E501
    threads_per_rank: int = option(0, "performance", "TensorFlow threads in each rank; 0: this rank's share of the node's cores", least=0)  # noqa: E501

    run_dir: str = option("", "checkpoints and recovery", "folder of this run; empty: a new one under runs/")
    resume: str = option("auto", "checkpoints and recovery", "auto: go on from the newest checkpoint of the run folder; never: start anew, older files are moved aside; or the path of a run folder or checkpoint")  # noqa: E501
    save_every: int = option(200, "checkpoints and recovery", "steps between checkpoints; 0: only at the end", least=0)  # noqa: E501
    async_save: str = option("on", "checkpoints and recovery", "write checkpoints while training goes on; off: stop until they are on the disk", choices=("on", "off"))  # noqa: E501
    keep: int = option(3, "checkpoints and recovery", "newest checkpoints kept", least=1)
    eval_every: int = option(100, "output", "steps between validations; 0 is never", least=0)
    log_every: int = option(10, "output", "steps between lines of progress", least=1)
    progress: str = option("auto", "output", "plain lines, a bar (auto: where one process has a terminal), or nothing", choices=("auto", "plain", "bar", "none"))  # noqa: E501
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_value(field, getattr(self, field.name))
        self._check_together()

    def _check_together(self) -> None:
        if self.val_fraction >= 1:
            raise UsageError(
                f"val_fraction is {self.val_fraction}, which leaves nothing to train on; use 0.1"
            )
        if self.dropout >= 1:
            raise UsageError(f"dropout is {self.dropout}, which drops everything; use a value below 1")
        if self.global_batch_size % self.micro_batch_rows:
            fits = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
            raise UsageError(
                f"micro_batch_size {self.micro_batch_size} does not divide global_batch_size "
                f"{self.global_batch_size}. Divisors: {', '.join(map(str, fits))}"
            )
        if self.model == "transformer" and self.width % self.heads:
            raise UsageError(
                f"heads {self.heads} does not divide width {self.width}: every head has the same width"
            )
        if self.seed >= 1 << 32:
            raise UsageError(f"seed is {self.seed}: Keras and NumPy take seeds below {1 << 32}")
        if self.steps and self.epochs:
            raise UsageError(f"both steps ({self.steps}) and epochs ({self.epochs}) are set: leave one at 0")
        if ":" not in self.model and self.model not in ("transformer", "lstm"):
            raise UsageError(
                f"unknown model {self.model!r}: transformer, lstm or package.module:function"
                + did_you_mean(self.model, ("transformer", "lstm"))
            )
        check_degrees(self)
        check_update(self)
        check_limits(self.stall_warn, self.stall_abort)

    @property
    def micro_batch_rows(self) -> int:
        """Sequences in a micro-batch, chosen when not given."""
        if self.micro_batch_size:
            return self.micro_batch_size
        return default_micro_batch(self.global_batch_size)

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one global batch."""
        return self.global_batch_size // self.micro_batch_rows

    def as_dict(self) -> dict[str, Any]:
        """Every field as plain JSON and YAML values, in the order of declaration."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def as_yaml(self) -> str:
        """Every field as a YAML file that ``--config`` accepts."""
        text = io.StringIO()
        yaml.safe_dump(self.as_dict(), text, sort_keys=False, allow_unicode=True)
        return text.getvalue()


def default(name: str) -> Any:
    """What an option is where nobody says anything; for those that have options of the same names."""
    return next(field.default for field in dataclasses.fields(Config) if field.name == name)


def check_option(name: str, value: Any) -> None:
    """Refuse a value that an option cannot have by itself.

    Raises:
        UsageError: with the choices, or the bound.
    """
    _check_value(next(field for field in dataclasses.fields(Config) if field.name == name), value)


def default_micro_batch(global_batch_size: int) -> int:
    """The largest divisor of the global batch that still makes at least four micro-batches.

    It may not look at the number of ranks, or results would depend on it.
    """
    largest = max(1, global_batch_size // 4)
    return next(rows for rows in range(largest, 0, -1) if global_batch_size % rows == 0)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """The nearest known word as the end of an error message, or nothing."""
    near = nearest(word, known)
    return f". Did you mean {near!r}?" if near else ""


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is most like another, or an empty string."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.6)), "")


def _check_value(field: dataclasses.Field[Any], value: Any) -> None:
    choices, least = field.metadata["choices"], field.metadata["least"]
    if choices and value not in choices:
        raise UsageError(
            f"{field.name} is {value!r}: choose one of {', '.join(choices)}"
            + did_you_mean(str(value), choices)
        )
    if least is not None and not value >= least:
        raise UsageError(f"{field.name} is {value}: it must be at least {least:g}")
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        raise UsageError(f"{field.name} is {value}: it must be finite")
