"""The ranks of `tf_dist.bench.strategies`: train with one strategy, or time its steps."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import memory, models, runner
from tf_dist.bench.strategies import FIRST, FOLDER, MICRO_BATCHES, NAMES, PLAIN, ROWS, WHAT
from tf_dist.strategies.registry import STRATEGIES

if TYPE_CHECKING:
    import numpy as np

    from tf_dist.comm.transport.base import Comm
    from tf_dist.training.trainer import Trainer

VALIDATED, WARM_UP, TIMED_STEPS, LOOK_EVERY_S = 128, 4, 12, 0.5
# Asynchronous ones between hosts: all weights for each gradient take seconds.
FEW = 2, 6
# Where steps are timed replicas meet this often, so that meetings are among them; between hosts they count
# as often as the strategy has them.
MEETING_EVERY = 4


def main_on_ranks(kind: str, model: str, out: Path) -> None:
    """Do a part; rank 0 writes what was found."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    what = comm.broadcast_obj(json.loads((FOLDER / WHAT).read_text()))  # another bench may write there
    tokens, held_out = split(Path(what["text"]))
    found: dict[str, Any] = {}
    if kind == "learn":
        ROWS[model] = what["rows"] or ROWS[model]
        memory.used_once(comm)  # what the first strategy would take for all
    for name in what["names"]:
        if kind == "learn":
            found[name] = learn(comm, model, name, tokens, held_out, what["steps"], what["every"])
        elif kind == "hosts":
            found[name] = time_steps(comm, model, name, tokens)
        else:
            found[name] = time_with_a_slow_rank(comm, model, name, tokens)
    if kind == "hosts":
        from tf_dist.bench import systems

        step = systems.compute_alone(models.RECIPES[model].sizes, ROWS[model] // comm.size)
        taken = [runner.slowest(comm, step) for _ in range(WARM_UP + TIMED_STEPS)][WARM_UP:]
        tokens_of_a_step = ROWS[model] * models.RECIPES[model].sizes["seq_len"]
        found["compute alone"] = {
            "step_ms": statistics.median(taken),
            "tokens": tokens_of_a_step,
            "sent": 0.0,
        }
    if comm.rank == 0:
        out.write_text(json.dumps(found))


def split(text: Path) -> tuple[np.ndarray, np.ndarray]:
    """Characters as numbers: nine tenths to train on, the last to validate."""
    import numpy as np

    _, ids = np.unique(np.frombuffer(text.read_bytes(), np.uint8), return_inverse=True)
    cut = int(0.9 * ids.size)
    return ids[:cut].astype(np.uint16), ids[cut:].astype(np.uint16)


def trainer_of(
    comm: Comm, model: str, name: str, steps: int, meeting_every: int = 0, allreduce: str = "auto"
) -> Trainer:
    """A trainer with the recipe's model and schedule, the same but for the strategy.

    Where ``meeting_every`` is given it does from the first step on what it does after the first ones.
    """
    import keras

    from tf_dist.config import Config
    from tf_dist.models.build import build
    from tf_dist.optim import optimizers
    from tf_dist.training.trainer import Trainer

    keras.utils.set_random_seed(1)
    strategy, options = NAMES[name]
    if meeting_every:
        options = {key: value for key, value in options.items() if key not in FIRST}
        if options.get("compression") == "onebit":  # which cannot do without
            options["compression_start"] = 1
        if "sync_every" in options and STRATEGIES[strategy].traits.lockstep:
            options["sync_every"] = meeting_every
        if "outer_delay" in options:  # it must fit between meetings
            options["outer_delay"] = 1
    usual = {"optimizer_args": {"beta_2": 0.99}, "warmup_steps": min(100, steps // 5)}
    config = Config(
        **models.RECIPES[model].sizes, vocab_size=models.VOCABULARY, strategy=strategy, steps=steps,
        **{**usual, **options},
    )  # fmt: skip
    built = build(config)
    return Trainer(
        built, optimizers.build(config, built, steps), comm, config.chosen_strategy(),
        global_batch_size=ROWS[model], micro_batch_size=ROWS[model] // MICRO_BATCHES,
        seq_len=config.seq_len, clip_norm=1.0, check_every=0, allreduce=allreduce,
    )  # fmt: skip


def learn(
    comm: Comm, model: str, name: str, tokens: np.ndarray, held_out: np.ndarray, steps: int, every: int
) -> dict[str, Any]:
    """Train, and validate now and then. Points: step, seconds of training, bytes sent by a rank, loss.

    Memory is what a rank takes beyond what every strategy does (`memory.used_once`).
    """
    before_pss = memory.memory_now()["pss"]
    trainer = trainer_of(comm, model, name, steps)
    trainer.tune()
    sequences = trainer.sequences(tokens)
    sampler, points = trainer.sampler(sequences), []
    few = held_out[: VALIDATED * trainer.seq_len + 1]
    trainer.last_step = steps
    trainer.synchronize_every = {every}
    seconds, sent = 0.0, 0
    with memory.Watch(LOOK_EVERY_S) as watch:
        while trainer.step < steps:
            comm.barrier()
            begun, before = time.perf_counter(), comm.sent_bytes
            for _ in range(every):
                trainer.train_step(sequences, sampler)
            trainer.synchronize()
            comm.barrier()
            seconds += time.perf_counter() - begun
            sent += comm.sent_bytes - before
            most = max(comm.allgather_obj(sent))
            validated = trainer.validate(few)
            points.append([trainer.step, seconds, most, validated["val_loss"]])
    more: dict[str, Any] = {"added_pss": max(comm.allgather_obj(watch.peak_pss - before_pss))}
    report = trainer.strategy.report()
    if report is not None and report.file:  # a master's, which only rank 0 has
        more["master"] = report.facts
    # Whole sums of this node's ranks are made in a window, which sends nothing.
    plain = NAMES[name].strategy == "allreduce" and "compression" not in NAMES[name].options
    whole = steps if plain else NAMES[name].options.get("compression_start", 0)
    if whole:
        each = bytes_of_a_step(comm, model, tokens)
        for point in points:
            point[2] += each * min(point[0], whole)
    done = {"tokens": steps * ROWS[model] * trainer.seq_len, "val_accuracy": validated["val_accuracy"]}
    return {"points": points, **done, **more}


def bytes_of_a_step(comm: Comm, model: str, tokens: np.ndarray) -> float:
    """What the rank that sends most sends in a step of allreduce by messages; a window sends nothing."""
    step = stepper(trainer_of(comm, model, PLAIN, 100, allreduce="messages"), tokens)
    step()
    before = comm.sent_bytes
    step()
    return float(max(comm.allgather_obj(comm.sent_bytes - before)))


def time_steps(comm: Comm, model: str, name: str, tokens: np.ndarray) -> dict[str, Any]:
    """Median milliseconds and bytes of a step; meetings counted as often as the strategy has them."""
    options = NAMES[name].options
    delayed = "outer_delay" in options
    trainer = trainer_of(comm, model, name, 1000, 0 if delayed else MEETING_EVERY)
    step = stepper(trainer, tokens)
    if not trainer.strategy.traits.lockstep:
        warm_up, timed = FEW
        stretch(comm, trainer, step, warm_up)
        before = comm.sent_bytes
        step_ms = stretch(comm, trainer, step, timed)
        most = max(comm.allgather_obj(comm.sent_bytes - before)) / timed
        return {"step_ms": step_ms, "sent": most, "tokens": ROWS[model] * trainer.seq_len}
    every = options.get("sync_every", 1)
    taken, sent, kinds = [], [], []
    for _ in range(WARM_UP + (every if delayed else TIMED_STEPS)):
        before, travelled = comm.sent_bytes, getattr(trainer.strategy, "is_in_flight", False)
        taken.append(runner.slowest(comm, step))
        sent.append(max(comm.allgather_obj(comm.sent_bytes - before)))
        kinds.append((travelled, getattr(trainer.strategy, "is_in_flight", False)))
    trainer.synchronize()
    mean = partial(mean_of_a_cycle, every=every)
    if delayed:
        mean = partial(mean_of_kinds, kinds=kinds[WARM_UP:])
    return {
        "step_ms": mean(taken[WARM_UP:]),
        "sent": mean(sent[WARM_UP:]),
        "tokens": ROWS[model] * trainer.seq_len,
    }


def stretch(comm: Comm, trainer: Trainer, step: Callable[[], Any], count: int) -> float:
    """Milliseconds of a step, from a barrier to the meeting after some: not one by one, as nobody waits."""
    trainer.last_step = trainer.step + count
    comm.barrier()
    begun = time.perf_counter()
    for _ in range(count):
        step()
    trainer.synchronize()
    comm.barrier()
    return 1e3 * (time.perf_counter() - begun) / count


def mean_of_a_cycle(values: Sequence[float], every: int) -> float:
    """The mean over ``every`` steps, one of them a meeting, from steps of which each fourth is one."""
    if every == 1:
        return statistics.median(values)
    meetings = values[MEETING_EVERY - 1 :: MEETING_EVERY]
    others = [value for at, value in enumerate(values) if (at + 1) % MEETING_EVERY]
    return (statistics.median(meetings) + (every - 1) * statistics.median(others)) / every


def mean_of_kinds(values: Sequence[float], kinds: Sequence[Any]) -> float:
    """The mean over a whole stretch, of which each value stands for the median of its kind."""
    of_kind: dict[Any, list[float]] = {}
    for value, kind in zip(values, kinds, strict=True):
        of_kind.setdefault(kind, []).append(value)
    return sum(len(found) * statistics.median(found) for found in of_kind.values()) / len(values)


def stepper(trainer: Trainer, tokens: np.ndarray) -> Callable[[], Any]:
    """A function that takes a step."""
    sequences = trainer.sequences(tokens)
    sampler = trainer.sampler(sequences)
    return lambda: trainer.train_step(sequences, sampler)


def time_with_a_slow_rank(comm: Comm, model: str, name: str, tokens: np.ndarray) -> dict[str, Any]:
    """Milliseconds of a global batch with all ranks alike, and with the last one twice as slow."""
    trainer = trainer_of(comm, model, name, 1000, MEETING_EVERY)
    replica: Any = trainer.replica
    gradients, slow = replica.gradients, [False]

    def slowly(*arguments: Any) -> Any:
        begun = time.perf_counter()
        found = gradients(*arguments)
        if slow[0]:
            time.sleep(time.perf_counter() - begun)
        return found

    replica.gradients = slowly
    step = stepper(trainer, tokens)
    taken = {}
    for kind in ("even_ms", "slow_ms"):
        slow[0] = kind == "slow_ms" and comm.rank == comm.size - 1
        stretch(comm, trainer, step, WARM_UP)
        taken[kind] = stretch(comm, trainer, step, 4 * TIMED_STEPS)
    return {**taken, "tokens": ROWS[model] * trainer.seq_len}


if __name__ == "__main__":
    main_on_ranks(sys.argv[1], sys.argv[2], Path(sys.argv[-1]))
