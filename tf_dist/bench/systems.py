"""Systems under comparison, each as a function that runs one step: tf_dist, and what users run today.

Legend: B rows of a rank, T tokens, P parameters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from tf_dist.bench import keras_baseline_models
from tf_dist.bench.models import CLIP_NORM, EPSILON, LEARNING_RATE, VOCABULARY, WEIGHT_DECAY
from tf_dist.config import Config
from tf_dist.data.rows import Rows
from tf_dist.data.sampler import Sampler
from tf_dist.models import lstm
from tf_dist.models.build import build
from tf_dist.parallel.flat_buffer import FlatLayout
from tf_dist.parallel.mesh import Mesh
from tf_dist.training.model import model_for
from tf_dist.training.trainer import Trainer

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm


def adamw(**words: Any) -> keras.optimizers.Optimizer:
    """The optimizer of all ways that use Keras's."""
    return keras.optimizers.AdamW(LEARNING_RATE, weight_decay=WEIGHT_DECAY, epsilon=EPSILON, **words)


def stock_model(
    sizes: dict[str, Any], rows: int, *, our_layers: bool = False, seed: int = 1
) -> tuple[keras.Model, keras.optimizers.Optimizer, Any]:
    """A model, its optimizer, and batches (B, T) of ids with their next ones.

    Args:
        sizes: of the model.
        rows: B.
        our_layers: whether it has our layers, or Keras's own, as with a user who knows nothing of us.
        seed: of the batches.
    """
    keras.utils.set_random_seed(1)
    config = Config(vocab_size=VOCABULARY, **sizes)
    shape = (VOCABULARY, config.seq_len, config.layers, config.width)
    if our_layers:
        model = build(config)
    elif config.model == "lstm":
        model = lstm.build(*shape, recurrent_layer=keras.layers.LSTM)
    else:
        model = keras_baseline_models.transformer(*shape, config.heads)
    optimizer = adamw(global_clipnorm=CLIP_NORM)
    optimizer.build(model.trainable_variables)
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (8, rows, sizes["seq_len"] + 1))
    batches = [tf.constant(batch) for batch in ids.astype(np.int32)]
    return model, optimizer, [(batch[:, :-1], batch[:, 1:]) for batch in batches]


def trainer_of(
    comm: Comm, sizes: dict[str, Any], rows: int, micro_batches: int, **options: Any
) -> tuple[Trainer, Rows, Sampler]:
    """Our Trainer with some rows and micro-batches for each rank, and data for a few steps.

    ``sizes`` may say how ranks share the model, by the names of `Config`; ``options`` are the Trainer's.
    """
    keras.utils.set_random_seed(1)
    config = Config(vocab_size=VOCABULARY, **sizes)
    mesh = Mesh(comm, config.pipeline_parallel, config.sequence_parallel, config.tensor_parallel)
    trainer = Trainer(
        model_for(config, mesh),
        adamw(),
        comm,
        global_batch_size=rows * comm.size,
        micro_batch_size=rows // micro_batches,
        seq_len=sizes["seq_len"],
        clip_norm=CLIP_NORM,
        mesh=mesh,
        **options,
    )
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, 8 * rows * comm.size * sizes["seq_len"] + 1)
    sequences = trainer.sequences(tokens.astype(np.uint16))
    return trainer, sequences, trainer.sampler(sequences)


class Ours:
    """Our Trainer, with a clock at each part of its step."""

    def __init__(self, comm: Comm, sizes: dict[str, Any], rows: int, **options: Any) -> None:
        made = trainer_of(comm, sizes, rows, micro_batches=1, **options)
        self.trainer, self.sequences, self.sampler = made
        self.trainer.tune()
        self._taken: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        trainer = self.trainer
        sums = vars(trainer.runner)["sums"]  # of a rank with the whole model
        for owner, verb, part in (
            (trainer, "_batches", "input"),  # what of it the step waits for
            (trainer.replica, "gradients", "forward+backward"),
            (sums, "add", "pack"),
            (sums, "terms", "pack"),
            (trainer.comm, "barrier", "wait"),
            (trainer.comm, "allreduce", "reduce"),
            (trainer.comm, "allreduce_terms", "reduce"),
            (trainer.comm, "broadcast", "reduce"),
            (trainer.replica, "apply", "update"),
        ):
            setattr(owner, verb, self._clocked(getattr(owner, verb), part))

    def _clocked(self, verb: Callable[..., Any], part: str) -> Callable[..., Any]:
        def clocked(*arguments: Any, **words: Any) -> Any:
            begun = time.perf_counter()
            result = verb(*arguments, **words)
            self._now[part] = self._now.get(part, 0.0) + time.perf_counter() - begun
            return result

        return clocked

    def step(self) -> None:
        """One step of the Trainer."""
        self._now = {}
        begun = time.perf_counter()
        self.trainer.train_step(self.sequences, self.sampler)
        self._taken.append({**self._now, "step": time.perf_counter() - begun})

    def parts_ms(self, dropped: int) -> dict[str, float]:
        """Median milliseconds of each part on this rank."""
        counted = self._taken[dropped:]
        return {part: 1e3 * statistics.median(step[part] for step in counted) for part in counted[0]}


def _gradients(model: keras.Model, x: Any, y: Any) -> list[Any]:
    """The gradients of the mean loss, each dense."""
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=True))
        loss = tf.reduce_mean(losses)
    return [tf.convert_to_tensor(part) for part in tape.gradient(loss, model.trainable_variables)]


def compute_alone(
    sizes: dict[str, Any], rows: int, reduced: Callable[[list[Any]], list[Any]] | None = None
) -> Callable[[], Any]:
    """Each rank trains our model by itself: what a step costs without any exchange.

    Args:
        sizes: of the model.
        rows: B.
        reduced: what becomes of the gradients inside the compiled step; then the layers are Keras's own.
    """
    model, optimizer, batches = stock_model(sizes, rows, our_layers=reduced is None)

    def step(x: Any, y: Any) -> None:
        gradients = _gradients(model, x, y)
        optimizer.apply(reduced(gradients) if reduced else gradients, model.trainable_variables)

    return _in_turn(tf.function(step), batches)


def horovod(comm: Comm, sizes: dict[str, Any], rows: int) -> Callable[[], Any]:
    """Horovod's grouped allreduce inside the compiled step, as its documentation has it."""
    return compute_alone(sizes, rows, comm._hvd.grouped_allreduce)  # type: ignore[attr-defined]


def plain_mpi4py(comm: Comm, sizes: dict[str, Any], rows: int) -> Callable[[], Any]:
    """What a careful user writes: one flat buffer, one `Allreduce`, then the optimizer."""
    model, optimizer, batches = stock_model(sizes, rows)
    layout = FlatLayout([variable.shape for variable in model.trainable_variables])

    def gradient(x: Any, y: Any) -> Any:
        return tf.concat([tf.reshape(part, (-1,)) for part in _gradients(model, x, y)], 0)

    def update(flat_P: tf.Tensor) -> None:
        parts = zip(tf.split(flat_P, layout.sizes), layout.shapes, strict=True)
        optimizer.apply([tf.reshape(part, shape) for part, shape in parts], model.trainable_variables)

    compute, apply = tf.function(gradient), tf.function(update)

    def step(x: Any, y: Any) -> None:
        flat_P = compute(x, y).numpy()
        comm.allreduce(flat_P)
        flat_P /= comm.size
        apply(tf.convert_to_tensor(flat_P))

    return _in_turn(step, batches)


def multi_worker(
    sizes: dict[str, Any], rows: int, rank: int
) -> tuple[Callable[[], Any], Callable[[], list[float]]]:
    """TensorFlow's own strategy with a loop as its documentation has it; ``TF_CONFIG`` must be set.

    Keras's optimizer sums the gradients of all replicas by itself: each divides its loss by their number.
    Clipping by the global norm would come before the sum, so the gradient is summed here and clipped then.

    Returns:
        A step, and the sums of all weights, which must be the same on all ranks.
    """
    ring = tf.distribute.experimental.CommunicationImplementation.RING
    options = tf.distribute.experimental.CommunicationOptions(implementation=ring)
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    with strategy.scope():
        model, optimizer, batches = stock_model(sizes, rows, seed=1 + rank)

    def on_replica(x: Any, y: Any) -> None:
        context = tf.distribute.get_replica_context()
        gradients = context.all_reduce(tf.distribute.ReduceOp.MEAN, _gradients(model, x, y), options=options)
        # One replica of each worker: what follows is the same everywhere, and needs no second sum.
        optimizer._all_reduce_sum_gradients = list
        optimizer.apply(gradients, model.trainable_variables)

    step = tf.function(lambda x, y: strategy.run(on_replica, args=(x, y)))

    def weights() -> list[float]:
        return [float(np.sum(np.asarray(variable), dtype=np.float64)) for variable in model.weights]

    return _in_turn(step, batches), weights


def keras_fit_ms(sizes: dict[str, Any], rows: int, times: int, dropped: int, xla: bool) -> list[float]:
    """Milliseconds of each step of Keras's ``fit`` in this process, but for the first ones."""
    model, optimizer, batches = stock_model(sizes, rows)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=xla)
    moments: list[float] = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: moments.append(time.perf_counter())
    )
    data = tf.data.Dataset.from_tensor_slices(
        tuple(tf.stack(part) for part in zip(*batches, strict=True))
    ).repeat()
    model.fit(data, steps_per_epoch=times + 1, verbose=0, callbacks=[clock])
    found: list[float] = (1e3 * np.diff(moments)[dropped:]).tolist()
    return found


def _in_turn(step: Callable[[Any, Any], Any], batches: Any) -> Callable[[], Any]:
    place = 0

    def work() -> None:
        nonlocal place
        step(*batches[place % len(batches)])
        place += 1

    return work
