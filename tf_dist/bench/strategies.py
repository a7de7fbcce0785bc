"""Every update and compression: validation loss over steps, time and bytes; slow networks, a slow rank.

    python scripts/bench.py strategies            # learn, hosts and slow, about an hour
    python scripts/bench.py strategies learn lstm-1.08M steps=300 ranks=4 only=allreduce,diloco-50
    python scripts/bench.py strategies hosts      # or slow: one rank that takes twice as long

``learn`` trains tinyshakespeare's characters on 2 and 4 ranks of this machine, all strategies one after
another in one job, with the same rows in the same order. ``hosts`` times steps of a larger model on two
emulated hosts: what a strategy learns does not depend on the network, but for downpour. ``slow`` lets the
last rank sleep as long as it computes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tf_dist.bench import memory, models, network, pictures, running
from tf_dist.bench.nanogpt import TEXTS
from tf_dist.choices import ASYNCHRONOUS

if TYPE_CHECKING:
    import numpy as np

    from tf_dist.comm.base import Comm
    from tf_dist.training.trainer import Trainer

MODULE = "tf_dist.bench.strategies"
FOLDER = running.FOLDER / "strategies"
WHAT = "what.json"
PARTS = ("learn", "hosts", "slow")
LEARNT, TIMED, SLOWED = ("gpt-0.81M", "lstm-1.08M"), "gpt-10.7M", "gpt-0.81M"
RANKS, HOSTS, RATES = (2, 4), 2, ("1gbit", "100mbit")
# Of all ranks, in a step; so that four ranks have a micro-batch each.
ROWS, MICRO_BATCHES = {"gpt-0.81M": 12, "lstm-1.08M": 32, "gpt-10.7M": 8}, 4
OPTIONS = {"steps": 500, "every": 100, "ranks": 0}
VALIDATED, WARM_UP, TIMED_STEPS, LOOK_EVERY_S = 128, 4, 12, 0.5
# In `hosts` and `slow` replicas meet this often, so that meetings can be timed; `hosts` counts with NAMES' H.
MEETING_EVERY = 4


# Options about the first steps of a training.
FIRST = ("sync_warmup_steps", "compression_start")


class Strategy(NamedTuple):
    """An update with its options, by the names of `tf_dist.config.Config`."""

    update: str = "allreduce"
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


NAMES = {
    "allreduce": Strategy(),
    "bf16": Strategy(options={"compression": "bf16"}),
    "powersgd 4": Strategy(options={"compression": "powersgd", "compression_start": 10}),
    "onebit": Strategy(options={"compression": "onebit", "compression_start": 100}),
    "topk 1 %": Strategy(options={"compression": "topk", "compression_start": 10}),
    "local-sgd 8": Strategy("local-sgd", {"sync_every": 8}),
    "diloco 50": Strategy("diloco", {"sync_every": 50}),
    "easgd 4": Strategy("easgd", {"sync_every": 4, "master_trains": "on"}),
    "gossip 1": Strategy("gossip", {"sync_every": 1}),
    "downpour 0": Strategy("downpour", {"staleness": 0, "master_trains": "on"}),
    "downpour 4": Strategy("downpour", {"staleness": 4, "master_trains": "on"}),
}
PLAIN = "allreduce"


def main(words: Sequence[str] = ()) -> int:
    """Start the jobs of the parts that are named, or of all; tables, a JSON file and a picture."""
    options, parts, chosen, only = dict(OPTIONS), [], [], list[str]()
    for word in words:
        key, equals, value = word.partition("=")
        if key == "only":
            only = value.replace("-", " ").split(",")
        elif equals and key in options:
            options[key] = int(value)
        elif word in PARTS:
            parts.append(word)
        else:
            chosen += models.chosen([word])
    text = next((path for path in TEXTS if path.is_file()), None)
    if text is None:
        print(f"bench-strategies: skipped, for there is no text: none of {', '.join(map(str, TEXTS))}")
        return 0
    names = [name for name in NAMES if not only or name == PLAIN or name.replace("-", " ") in only]
    what = {"text": str(text), "names": names, **options}
    report: dict[str, Any] = {"text": text.name, "options": options}
    if "learn" in (parts or PARTS):
        report["learn"] = [
            learnt(ranks, model, what)
            for model in chosen or LEARNT
            for ranks in ([options["ranks"]] if options["ranks"] else RANKS)
        ]
    if "hosts" in (parts or PARTS):
        report["hosts"] = timed_on_hosts(what)
    if "slow" in (parts or PARTS):
        print("one slow rank ...", flush=True)
        report["slow"] = job(4, "slow", SLOWED, what)
        print(f"\n{slow_table(report['slow'])}\n", flush=True)
    path = running.save("strategies", report)
    print(f"in {path}")
    for found in report.get("learn", []):
        drawn = path.with_name(f"{path.stem}-{found['model']}-{found['ranks']}.png")
        print(f"and {picture(found, drawn)}")
    return 0


def job(ranks: int, kind: str, model: str, what: dict[str, Any], *more: str, by: Sequence[str] = ()) -> Any:
    """Start a job, which finds in a file what it is to do: the path of a text is no part of a file's name."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / WHAT).write_text(json.dumps(what))
    return running.measured(ranks, MODULE, kind, model, *more, folder=FOLDER, by=by)


def learnt(ranks: int, model: str, what: dict[str, Any]) -> dict[str, Any]:
    """Train a model by each strategy."""
    print(f"{model} on {ranks} ranks ...", flush=True)
    found = {"ranks": ranks, "model": model, "runs": job(ranks, "learn", model, what)}
    print(f"\n{learn_table(found)}\n{masters(found)}", flush=True)
    return found


def timed_on_hosts(what: dict[str, Any]) -> dict[str, Any]:
    """Time each strategy's steps between two hosts."""
    command = [sys.executable, str(network.CLUSTER)]
    check = subprocess.run([*command, "--check"], capture_output=True, text=True)
    if check.returncode in network.NOT_HERE:
        print(f"two hosts are skipped: {check.stderr.strip()}")
        return {}
    found = {}
    for rate in RATES:
        print(f"two hosts at {rate} ...", flush=True)
        by = [*command, "--hosts", str(HOSTS), "--rate", rate, "--"]
        found[rate] = job(HOSTS, "hosts", TIMED, what, rate, by=by)
        print(f"\n{hosts_table(rate, found[rate])}\n", flush=True)
    return found


# What is shown -------------------------------------------------------------------------------------


def learn_table(job: dict[str, Any]) -> str:
    """A line for each strategy; losses beside that of plain allreduce."""
    runs = job["runs"]
    plain = runs[PLAIN]["points"][-1]
    rows = []
    for name, run in runs.items():
        _, seconds, _, loss = run["points"][-1]
        sent = sent_of_a_step(run)
        rows.append(
            [
                name,
                f"{loss:.4f}",
                f"{100 * (loss / plain[3] - 1):+.1f} %",
                f"{seconds:.1f}",
                f"{run['tokens'] / seconds:,.0f}",
                f"{memory.MB * sent:.3f}",
                f"{sent_of_a_step(runs[PLAIN]) / sent:.1f}" if sent else "",
                f"{memory.MB * run['peak_pss']:.0f}",
            ]
        )
    head = [
        f"{job['model']}, {running.ranks_named(job['ranks'])} ranks", "val loss", "gap", "train s",
        "tokens/s", "sent MB/step", "fewer", "peak MB",
    ]  # fmt: skip
    return running.table(head, rows)


def masters(job: dict[str, Any]) -> str:
    """For how many workers each master would be at work all the time, from its work for those that it had.

    By formula: a worker asks once in the time u of a unit; its push and its answer keep the master busy for
    b, two copies of all weights and an optimizer step. So u / b workers keep it busy.
    """
    lines = []
    for name, run in job["runs"].items():
        if "master" in run:
            load, workers = run["master"]["master_load"], max(1, job["ranks"] - 1)
            busy_ms = 1e3 * load / run["master"]["updates_per_s"]
            lines.append(
                f"{name}: the master is at work {100 * load:.0f} % of the time with {workers} workers, "
                f"{busy_ms:.1f} ms for each push: {workers / load:.0f} workers would keep it busy\n"
            )
    return "".join(lines)


def sent_of_a_step(run: dict[str, Any]) -> float:
    """Bytes after the first steps, in which strategies may do something else."""
    before, last = run["points"][-2:]
    return float((last[2] - before[2]) / (last[0] - before[0]))


def hosts_table(rate: str, runs: dict[str, Any]) -> str:
    """Tokens per second over a network; the ratios last."""
    plain, alone = runs[PLAIN]["step_ms"], runs["compute alone"]["step_ms"]
    rows = [
        [
            name,
            f"{run['step_ms']:.0f}",
            f"{run['tokens'] / run['step_ms'] * 1e3:,.0f}",
            f"{memory.MB * run['sent']:.2f}",
            f"{plain / run['step_ms']:.2f}",
            f"{alone / run['step_ms']:.2f}",
        ]
        for name, run in runs.items()
    ]
    head = [f"{TIMED}, two hosts at {rate}", "ms", "tokens/s", "sent MB", "to allreduce", "to compute alone"]
    return running.table(head, rows)


def slow_table(runs: dict[str, Any]) -> str:
    """Tokens per second with all ranks alike, and with the last one slowed down."""
    plain = runs[PLAIN]["slow_ms"]
    rows = [
        [
            name,
            *(f"{run['tokens'] / run[key] * 1e3:,.0f}" for key in ("even_ms", "slow_ms")),
            f"{plain / run['slow_ms']:.2f}",
        ]
        for name, run in runs.items()
    ]
    head = [f"{SLOWED}, {running.ranks_named(4)} ranks, tokens/s", "even", "one slow", "to allreduce"]
    return running.table(head, rows)


def picture(job: dict[str, Any], path: Path) -> Path:
    """Validation loss over steps, seconds and bytes, a line for each strategy."""
    title = f"{job['model']}, {job['ranks']} ranks"
    axes = (("steps", 0, 1.0), ("seconds of training", 1, 1.0), ("MB sent by a rank", 2, memory.MB))
    panels = []
    for axis, column, scale in axes:
        drawn = {
            name: [(scale * point[column], point[3]) for point in run["points"] if point[column] > 0]
            for name, run in job["runs"].items()
        }
        drawn = {name: points for name, points in drawn.items() if points}
        if drawn:
            panels.append(pictures.Lines(title, axis, "validation loss", drawn, log=column == 2))
    return pictures.lines(path, panels)


# On the ranks --------------------------------------------------------------------------------------


def main_on_ranks(kind: str, model: str, out: Path) -> None:
    """Do a part; rank 0 writes what was found."""
    from tf_dist.comm import launch

    comm = launch.connect()
    what = json.loads((FOLDER / WHAT).read_text())
    tokens, held_out = split(Path(what["text"]))
    found: dict[str, Any] = {}
    for name in what["names"]:
        if kind == "learn":
            found[name] = learn(comm, model, name, tokens, held_out, what["steps"], what["every"])
        elif kind == "hosts":
            found[name] = time_steps(comm, model, name, tokens)
        else:
            found[name] = time_with_a_slow_rank(comm, model, name, tokens)
    if kind == "hosts":
        from tf_dist.bench import ways

        step = ways.compute_alone(models.RECIPES[model].sizes, ROWS[model] // comm.size)
        taken = [running.slowest(comm, step) for _ in range(WARM_UP + TIMED_STEPS)][WARM_UP:]
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
    from tf_dist.training import optimizers
    from tf_dist.training.arrange import options_of
    from tf_dist.training.trainer import Trainer

    keras.utils.set_random_seed(1)
    update, options = NAMES[name]
    if meeting_every:
        options = {key: value for key, value in options.items() if key not in FIRST}
        if options.get("compression") == "onebit":  # which cannot do without
            options["compression_start"] = 1
        if "sync_every" in options and update not in ASYNCHRONOUS:
            options["sync_every"] = meeting_every
    config = Config(
        **models.RECIPES[model].sizes, vocab_size=models.VOCABULARY, update=update, steps=steps,
        optimizer_args={"beta_2": 0.99}, warmup_steps=min(100, steps // 5), **options,
    )  # fmt: skip
    built = build(config)
    groups: dict[str, Any] = options_of(config)
    return Trainer(
        built, optimizers.build(config, built, steps), comm, update,
        global_batch_size=ROWS[model], micro_batch_size=ROWS[model] // MICRO_BATCHES,
        seq_len=config.seq_len, clip_norm=1.0, check_every=0, allreduce=allreduce, **groups,
    )  # fmt: skip


def learn(
    comm: Comm, model: str, name: str, tokens: np.ndarray, held_out: np.ndarray, steps: int, every: int
) -> dict[str, Any]:
    """Train, and validate now and then. Points: step, seconds of training, bytes sent by a rank, loss."""
    trainer = trainer_of(comm, model, name, steps)
    from tf_dist.training.downpour import Downpour

    trainer.tuning.choose()
    sequences = trainer.sequences(tokens)
    sampler, points = trainer.sampler(sequences), []
    few = held_out[: VALIDATED * trainer.seq_len + 1]
    trainer.last_step = steps
    trainer.meets_every = {every}
    seconds, sent = 0.0, 0
    with memory.Watch(LOOK_EVERY_S) as watch:
        while trainer.step < steps:
            comm.barrier()
            begun, before = time.perf_counter(), comm.sent_bytes
            for _ in range(every):
                trainer.train_step(sequences, sampler)
            trainer.meet()
            comm.barrier()
            seconds += time.perf_counter() - begun
            sent += comm.sent_bytes - before
            most = max(comm.allgather_obj(sent))
            points.append([trainer.step, seconds, most, trainer.validate(few)["val_loss"]])
    peak, more = max(comm.allgather_obj(watch.peak_pss)), dict[str, Any]()
    # Meetings and compressed sums of the next strategies are to be messages, to be counted.
    comm.forget_buffers(trainer.replica.parameters, trainer.arrangement.order)
    if isinstance(trainer.update, Downpour) and comm.rank == 0:
        more = {"master": trainer.update.load.report()}
    if name == PLAIN:
        each = bytes_of_a_step(comm, model, tokens)
        points = [[step, seconds, each * step, loss] for step, seconds, _, loss in points]
    return {"points": points, "tokens": steps * ROWS[model] * trainer.seq_len, "peak_pss": peak, **more}


def bytes_of_a_step(comm: Comm, model: str, tokens: np.ndarray) -> float:
    """What the rank that sends most sends in a step of allreduce by messages; a window sends nothing."""
    step = stepper(trainer_of(comm, model, PLAIN, 100, allreduce="messages"), tokens)
    step()
    before = comm.sent_bytes
    step()
    return float(max(comm.allgather_obj(comm.sent_bytes - before)))


def time_steps(comm: Comm, model: str, name: str, tokens: np.ndarray) -> dict[str, Any]:
    """Median milliseconds and bytes of a step; meetings counted as often as the strategy has them."""
    trainer = trainer_of(comm, model, name, 1000, MEETING_EVERY)
    step = stepper(trainer, tokens)
    if NAMES[name].update in ASYNCHRONOUS:
        stretch(comm, trainer, step, WARM_UP)
        before = comm.sent_bytes
        step_ms = stretch(comm, trainer, step, TIMED_STEPS)
        most = max(comm.allgather_obj(comm.sent_bytes - before)) / TIMED_STEPS
        return {"step_ms": step_ms, "sent": most, "tokens": ROWS[model] * trainer.seq_len}
    taken, sent = [], []
    for _ in range(WARM_UP + TIMED_STEPS):
        before = comm.sent_bytes
        taken.append(running.slowest(comm, step))
        sent.append(max(comm.allgather_obj(comm.sent_bytes - before)))
    every = NAMES[name].options.get("sync_every", 1)
    return {
        "step_ms": mean_of_a_cycle(taken[WARM_UP:], every),
        "sent": mean_of_a_cycle(sent[WARM_UP:], every),
        "tokens": ROWS[model] * trainer.seq_len,
    }


def stretch(comm: Comm, trainer: Trainer, step: Callable[[], Any], count: int) -> float:
    """Milliseconds of a step, from a barrier to the meeting after some: not one by one, as nobody waits."""
    trainer.last_step = trainer.step + count
    comm.barrier()
    begun = time.perf_counter()
    for _ in range(count):
        step()
    trainer.meet()
    comm.barrier()
    return 1e3 * (time.perf_counter() - begun) / count


def mean_of_a_cycle(values: Sequence[float], every: int) -> float:
    """The mean over ``every`` steps, one of them a meeting, from steps of which each fourth is one."""
    if every == 1:
        return statistics.median(values)
    meetings = values[MEETING_EVERY - 1 :: MEETING_EVERY]
    others = [value for at, value in enumerate(values) if (at + 1) % MEETING_EVERY]
    return (statistics.median(meetings) + (every - 1) * statistics.median(others)) / every


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
