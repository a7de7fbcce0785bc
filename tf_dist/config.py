"""What a training run is: one frozen dataclass, and everything derived from its fields.

The flags of ``tf-dist train``, the keys of a YAML file, the validation and ``--print-config`` all
come from the fields of `Config`, so a new option is one new field; ``flags.py`` reads them. Nothing
here imports TensorFlow or MPI: ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from typing import Any

import yaml

from tf_dist.comm.stalls import check_limits
from tf_dist.degrees import check_degrees, check_horovod, in_use
from tf_dist.errors import UsageError
from tf_dist.options import check_value, option
from tf_dist.parallel.compress import COMPRESSORS
from tf_dist.spelling import did_you_mean
from tf_dist.strategies.base import Setting, Strategy
from tf_dist.strategies.registry import FLAT_OPTIONS, STRATEGIES, by_pace, own_options, strategy_of

# Tokens of a BPE vocabulary where no number is given.
BPE_DEFAULT_VOCAB = 2048


def of_a_strategy(name: str) -> Any:
    """An option of strategies or compressors, which have its default, its help and its bounds."""
    option = FLAT_OPTIONS[name]
    return dataclasses.field(default=option.default, metadata=option.metadata)


@dataclass(frozen=True)
class Config:
    """One run. Units: sizes in rows or tokens, rates per optimizer step, names as in the field.

    Raises:
        UsageError: a value is out of range, or two values cannot hold together.
    """

    # fmt: off
    data: tuple[str, ...] = option(("stdlib",), "data", "files, globs, folders, a name of data/datasets.yaml, or `stdlib`: the Python standard library's own sources")  # noqa: E501
    text_column: str = option("text", "data", "column with the text in .csv .tsv .jsonl .parquet")
    tokenizer: str = option("bpe", "data", "byte, char, bpe (trained on the corpus), or the path of a tokenizer.json")  # noqa: E501
    vocab_size: int = option(0, "data", "vocabulary size; 0: as many tokens as needed (bpe: 2048)", least=0)
    val_fraction: float = option(0.1, "data", "fraction of the text held out for validation, split by document", least=0)  # noqa: E501
    errors: str = option("strict", "data", "on bytes that are not UTF-8: stop, or replace and count them", choices=("strict", "replace"))  # noqa: E501
    max_bytes: int = option(4_000_000, "data", "use at most this much of the stdlib corpus; 0: all of it", least=0)  # noqa: E501
    prepared_dir: str = option("data/prepared", "data", "cache folder of tokenized data")

    model: str = option("transformer", "model", "transformer, lstm, or package.module:function, called with the configuration, returning a keras.Model")  # noqa: E501
    layers: int = option(4, "model", "number of layers", least=1)
    width: int = option(128, "model", "width of the residual stream, or units of each LSTM layer", least=1)
    heads: int = option(4, "model", "attention heads; must divide the width", least=1)
    seq_len: int = option(64, "model", "tokens in a sequence", least=1)
    dropout: float = option(0.0, "model", "dropout rate of activations in training", least=0)
    tie_embeddings: bool = option(True, "model", "tie the output layer to the embedding matrix")
    precision: str = option("float32", "model", "compute precision of the model; weights, optimizer, loss and reductions stay float32", choices=("float32", "bfloat16"))  # noqa: E501

    global_batch_size: int = option(32, "batch and steps", "sequences per optimizer step, over all ranks", least=1)  # noqa: E501
    micro_batch_size: int = option(0, "batch and steps", "sequences per forward and backward pass; must divide the global batch; 0: automatic, see the banner", least=0)  # noqa: E501
    steps: int = option(0, "batch and steps", "optimizer steps; 0: as many as --epochs takes, or 400", least=0)  # noqa: E501
    epochs: int = option(0, "batch and steps", "passes over the training data, when steps is 0", least=0)
    seed: int = option(1, "batch and steps", "random seed for split, data order, initial weights and dropout", least=0)  # noqa: E501

    optimizer: str = option("adamw", "optimizer", "name of a Keras optimizer: adam, adamw, sgd, lion, ...")
    optimizer_args: dict[str, Any] = option({}, "optimizer", "extra arguments of the optimizer, as in beta_2=0.99,epsilon=1e-8")  # noqa: E501
    learning_rate: float = option(1e-3, "optimizer", "peak learning rate", least=0)
    min_learning_rate: float = option(1e-4, "optimizer", "final learning rate of linear, cosine and 1cycle", least=0)  # noqa: E501
    schedule: str = option("cosine", "optimizer", "learning-rate decay after the warm-up", choices=("constant", "linear", "cosine", "1cycle"))  # noqa: E501
    warmup_steps: int = option(20, "optimizer", "steps of linear warm-up from 0 to the peak", least=0)
    weight_decay: float = option(0.1, "optimizer", "decoupled weight decay of matrices (not of biases and gains)", least=0)  # noqa: E501
    clip_norm: float = option(1.0, "optimizer", "gradient clipping: maximum global norm of the mean gradient; 0: none", least=0)  # noqa: E501
    on_spike: str = option("off", "checks", "on a training-loss spike: nothing, warn, or roll back to an earlier checkpoint and skip the batches since", choices=("off", "warn", "rollback"))  # noqa: E501
    spike_factor: float = option(10.0, "checks", "spike threshold: median of the last 64 losses plus this many times their spread", least=0)  # noqa: E501
    spike_skip: int = option(100, "checks", "further batches to skip after a spike", least=0)
    max_bad_steps: int = option(10, "checks", "consecutive steps skipped for non-finite gradients; the next one ends the run. 0: the first one does", least=0)  # noqa: E501

    tensor_parallel: int = option(1, "parallelism", "tensor parallelism: ranks that shard every layer (heads, units, vocabulary)", least=1)  # noqa: E501
    pipeline_parallel: int = option(1, "parallelism", "pipeline parallelism: ranks that split the layers into consecutive stages", least=1)  # noqa: E501
    sequence_parallel: int = option(1, "parallelism", "context parallelism: ranks that split the tokens of a sequence (transformer)", least=1)  # noqa: E501
    pipeline_schedule: str = option("1f1b", "parallelism", "pipeline schedule: order of forward and backward passes of micro-batches", choices=("gpipe", "1f1b", "interleaved", "zero-bubble"))  # noqa: E501
    pipeline_cuts: str = option("", "parallelism", "first layer of each stage after the first, as in 2,4; empty: stages of equal cost")  # noqa: E501
    virtual_stages: int = option(2, "parallelism", "stages per rank with the interleaved schedule", least=2)
    micro_batches_in_flight: int = option(0, "parallelism", "maximum micro-batches whose activations a pipeline rank keeps; 0: as the schedule needs", least=0)  # noqa: E501
    recompute: str = option("off", "parallelism", "activation checkpointing: recompute a pipeline stage's activations in the backward pass", choices=("on", "off"))  # noqa: E501

    strategy: str = option("allreduce", "strategy", f"how ranks synchronize: {by_pace()}; or package.module:Class of your own")  # noqa: E501
    zero_stage: int = of_a_strategy("zero_stage")
    staleness: int = of_a_strategy("staleness")
    staleness_aware: str = of_a_strategy("staleness_aware")
    master_trains: str = of_a_strategy("master_trains")
    sync_every: int = of_a_strategy("sync_every")
    elastic_force: float = of_a_strategy("elastic_force")
    sync_warmup_steps: int = of_a_strategy("sync_warmup_steps")
    outer_lr: float = of_a_strategy("outer_lr")
    outer_momentum: float = of_a_strategy("outer_momentum")
    outer_fragments: int = of_a_strategy("outer_fragments")
    outer_precision: str = of_a_strategy("outer_precision")
    outer_delay: int = of_a_strategy("outer_delay")
    compression: str = option("none", "compression", "gradient compression before the all-reduce, with strategy allreduce; error feedback keeps what is not sent for the next step", choices=("none", *COMPRESSORS))  # noqa: E501
    compression_rank: int = of_a_strategy("compression_rank")
    compression_least_rate: float = of_a_strategy("compression_least_rate")
    compression_density: float = of_a_strategy("compression_density")
    compression_momentum: float = of_a_strategy("compression_momentum")
    compression_start: int = of_a_strategy("compression_start")
    backend: str = option("mpi", "strategy", "communication library", choices=("mpi", "horovod"))
    allreduce: str = option("auto", "performance", "all-reduce transport: shared-memory window, messages, or the faster one", choices=("auto", "window", "messages"))  # noqa: E501
    chunk_bytes: int = option(0, "performance", "chunk size of all-reduce by messages; 0: the fastest, measured at the start", least=0)  # noqa: E501
    overlap: str = option("auto", "performance", "overlap all-reduce with the backward pass: auto (if ranks span nodes), on, off", choices=("auto", "on", "off"))  # noqa: E501
    autotune: str = option("exact", "performance", "what to time before the first step: only what changes no bit of the result, also whether XLA pays off (which changes bits), or nothing", choices=("exact", "full", "off"))  # noqa: E501
    xla: str = option("auto", "performance", "JIT-compile forward and backward with XLA; auto: keep the checkpoint's choice, else decide by --autotune", choices=("auto", "on", "off"))  # noqa: E501
    check_every: int = option(100, "checks", "steps between consistency checks of all ranks' weights and optimizers, bit for bit; 0: only in the first steps", least=0)  # noqa: E501
    on_mismatch: str = option("stop", "checks", "when a rank differs: stop, or restore it from the majority", choices=("stop", "restore"))  # noqa: E501
    min_ranks: int = option(1, "checkpoints and recovery", "with fault tolerance (mpirun --with-ft ulfm): end the run if fewer ranks survive", least=1)  # noqa: E501
    replicate: int = option(0, "checkpoints and recovery", "steps between peer (buddy) copies of each rank's state in memory, for recovery where a step cannot be finished without a rank (ZeRO, master, grids); 0: checkpoints only", least=0)  # noqa: E501
    stall_warn: float = option(60.0, "checkpoints and recovery", "seconds that ranks wait for another one before they report it, and what it does; 0: never", least=0)  # noqa: E501
    stall_abort: float = option(600.0, "checkpoints and recovery", "seconds after which they end the job, with 70; 0: never. A rank that still prepares or compiles is given time", least=0)  # noqa: E501
    threads_per_rank: int = option(0, "performance", "TensorFlow threads per rank; 0: this rank's share of the node's cores", least=0)  # noqa: E501

    run_dir: str = option("", "checkpoints and recovery", "run folder; empty: a new one under runs/")
    resume: str = option("auto", "checkpoints and recovery", "auto: resume from the newest checkpoint of the run folder; never: start from scratch, older files are moved aside; or the path of a run folder or checkpoint")  # noqa: E501
    save_every: int = option(200, "checkpoints and recovery", "steps between checkpoints; 0: only at the end", least=0)  # noqa: E501
    async_save: str = option("on", "checkpoints and recovery", "write checkpoints in the background; off: block until they are on disk", choices=("on", "off"))  # noqa: E501
    keep: int = option(3, "checkpoints and recovery", "number of newest checkpoints to keep", least=1)
    eval_every: int = option(100, "output", "steps between validations; 0: never", least=0)
    log_every: int = option(10, "output", "steps between progress lines", least=1)
    progress: str = option("auto", "output", "plain lines, a bar (auto: if rank 0's output is a terminal), or nothing", choices=("auto", "plain", "bar", "none"))  # noqa: E501
    # fmt: on

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field.name, getattr(self, field.name), field.metadata)
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
        self._check_strategy()
        check_horovod(self)
        check_limits(self.stall_warn, self.stall_abort)

    def _check_strategy(self) -> None:
        """Refuse options of another strategy than was chosen, and what it cannot work in.

        Of a user's strategy only the name is known: its code runs where somebody trains with it.
        """
        if ":" in self.strategy:
            own_options(self.strategy, self._flat_options())
            return
        strategy = self.chosen_strategy()
        strategy.check(Setting(in_use(self), self.backend, self.optimizer.lower()))
        if self.on_spike != "off" and not strategy.traits.replicas_equal:
            fit = [name for name, one in STRATEGIES.items() if one().traits.replicas_equal]
            raise UsageError(
                f"on_spike is {self.on_spike}, but with strategy {strategy} not all ranks take each step "
                f"together. Use --strategy {' or '.join(fit)}, or --on-spike off"
            )

    def chosen_strategy(self) -> Strategy:
        """A new object of the strategy that was chosen; of a user's, the code is imported.

        Raises:
            UsageError: it cannot be had, or options are not its own.
        """
        return strategy_of(self.strategy, self._flat_options())

    def _flat_options(self) -> dict[str, Any]:
        names = ("compression", *FLAT_OPTIONS)
        return {name: getattr(self, name) for name in names}

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
    metadata = next(field.metadata for field in dataclasses.fields(Config) if field.name == name)
    check_value(name, value, metadata)


def default_micro_batch(global_batch_size: int) -> int:
    """The largest divisor of the global batch that still makes at least four micro-batches.

    It may not look at the number of ranks, or results would depend on it.
    """
    largest = max(1, global_batch_size // 4)
    return next(rows for rows in range(largest, 0, -1) if global_batch_size % rows == 0)
