"""Optimizer step from a flat gradient: per variable, as one vector, and in blocks.

All ways to take it are timed in turn in one process, on the same gradient, for two models and three
optimizers.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tf_dist.bench import models, plots, runner

if TYPE_CHECKING:
    from tf_dist.comm.transport.base import Comm

MODULE = "tf_dist.bench.optimizer"
FOLDER = runner.FOLDER / "optimizer"
DROPPED = 3
# Model, and steps in each way.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "GPT 0.81 M": (models.GPT_SMALL, 60),
    "GPT 10.7 M": (models.GPT, 15),
}
OPTIMIZERS = ("AdamW", "SGD momentum", "Lion")
WAYS = ("variables", "variables XLA", "flat", "flat XLA", "blocks", "blocks XLA")
OURS = "blocks XLA"


def main() -> int:
    """Start the process that measures, and print what it found."""
    print("1 process ...", flush=True)
    job = runner.measured(1, MODULE, folder=FOLDER)
    path = runner.save("optimizer", job)
    print(f"\n{table(job['steps'])}\n\nin {path}\nand {picture(job['steps'], path.with_suffix('.png'))}")
    return 0


def picture(steps: list[dict[str, Any]], path: Path) -> Path:
    """Milliseconds of a step in each way; a panel for each model and optimizer."""
    panels = [
        plots.Bars(
            f"{found['model']}, {found['optimizer']}",
            list(WAYS),
            [found["ms"][way] for way in WAYS],
            [way == OURS for way in WAYS],
        )
        for found in steps
    ]
    return plots.bars(path, "ms of a step", panels)


def table(steps: list[dict[str, Any]]) -> str:
    """Milliseconds of a step, and seconds of the first one, in which it is traced and compiled."""
    head = ["a step of", "optimizer", *(f"{way} ms" for way in WAYS), "ratio"]
    head += ["first: variables s", "variables XLA s", f"{OURS} s"]
    rows = [
        [
            *(found["model"], found["optimizer"]),
            *(f"{found['ms'][way]:.2f}" for way in WAYS),
            f"{found['ms'][OURS] / found['ms']['variables']:.2f}",
            *(f"{found['first_s'][way]:.1f}" for way in ("variables", "variables XLA", OURS)),
        ]
        for found in steps
    ]
    return runner.table(head, rows)


# On the rank -------------------------------------------------------------------------------------


def main_on_ranks(out: Path) -> None:
    """Measure everything; the medians are left in a file."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    steps = [
        {"model": name, "optimizer": optimizer, **medians(comm, sizes, optimizer, times)}
        for name, (sizes, times) in MODELS.items()
        for optimizer in OPTIMIZERS
    ]
    out.write_text(json.dumps({"steps": steps}))


def medians(comm: Comm, sizes: dict[str, Any], optimizer: str, times: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step, and seconds of the first one, by way."""
    import numpy as np
    import tensorflow as tf

    scale = np.float32(1e-3)
    first_s, works = {}, {}
    for way in WAYS:
        step = step_of(sizes, optimizer, way)
        length = sum(len(part) for part in step.parts)
        gradient = tf.constant(np.random.default_rng(1).normal(0, 1, length).astype(np.float32))
        begun = time.perf_counter()
        step.apply(gradient, scale)
        first_s[way] = time.perf_counter() - begun
        works[way] = lambda apply=step.apply, gradient=gradient: apply(gradient, scale)
    return {"ms": runner.interleaved(comm, works, DROPPED + times, DROPPED), "first_s": first_s}


def step_of(sizes: dict[str, Any], optimizer: str, way: str) -> Any:
    """A model's optimizer step in one of the ways; vectors of the model do not decay."""
    import keras

    from tf_dist.config import Config
    from tf_dist.models.build import build
    from tf_dist.optim.fused_optimizer import BlockStep, VariableStep

    kinds = {
        "AdamW": lambda: keras.optimizers.AdamW(1e-4, weight_decay=0.1),
        "SGD momentum": lambda: keras.optimizers.SGD(1e-2, momentum=0.9),
        "Lion": lambda: keras.optimizers.Lion(1e-5, weight_decay=0.1),
    }
    variables = build(Config(vocab_size=models.VOCABULARY, **sizes)).trainable_variables
    made = kinds[optimizer]()
    made.exclude_from_weight_decay(var_list=[one for one in variables if len(one.shape) < 2])
    made.build(variables)
    fused = way.endswith("XLA")
    if way.startswith("variables"):
        return VariableStep(made, variables, fused=fused)
    more = {"alone_from": sys.maxsize} if way.startswith("flat") else {}
    return BlockStep(made, variables, fused=fused, **more)


if __name__ == "__main__":
    main_on_ranks(Path(sys.argv[1]))
