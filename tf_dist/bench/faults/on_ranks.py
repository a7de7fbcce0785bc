"""Rank program of the campaigns: a training in which some ranks kill themselves."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

STEPS = 32
EVERY = 8
# A step takes some milliseconds, and so does what comes after every eighth.
LATEST_S = 0.02


class Death(NamedTuple):
    """Of a rank: so long after it has begun a step, or the first one from there on."""

    step: int
    after_s: float


def drawn(ranks: int, deaths: int, seed: int) -> dict[int, Death]:
    """Who dies when."""
    chance = random.Random(f"{ranks} {deaths} {seed}")  # noqa: S311 - nothing secret
    steps = sorted(chance.sample(range(1, STEPS - 2), deaths))
    victims = chance.sample(range(ranks), deaths)
    return {rank: Death(step, LATEST_S * chance.random()) for rank, step in zip(victims, steps, strict=True)}


def main(deaths: int, seed: int, out: Path) -> None:
    """Train on all ranks; the first of those that are left writes what it has found."""
    from tf_dist.comm.runtime import launch

    comm = launch.connect()
    import keras
    import numpy as np

    from tf_dist.config import Config
    from tf_dist.models.build import build
    from tf_dist.run.run_callbacks import SaveRun
    from tf_dist.training import state_dict
    from tf_dist.training.trainer import Trainer

    model = build(Config(layers=1, width=16, heads=2, seq_len=8, vocab_size=17))
    adam = keras.optimizers.Adam(1e-2)
    trainer = Trainer(model, adam, comm, clip_norm=0.0, global_batch_size=16, micro_batch_size=2, seq_len=8)
    death = drawn(comm.size, deaths, seed).get(comm.rank)
    if death is not None:
        let_die(trainer, death)
    tokens = np.arange(5000) ** 2 % 17
    folder = out.with_suffix("")
    save = SaveRun(trainer, EVERY, lambda: state_dict.save(trainer, folder, 1, {}))
    trainer.fit(tokens, steps=STEPS, validation=tokens[:500], eval_every=EVERY, callbacks=[save])
    found: dict[str, Any] = {"weights_sha256": trainer.check_equal(), "ranks": comm.size}
    found["recoveries"] = [one._asdict() for one in trainer.in_place.recoveries]
    trainer.in_place.close()
    if comm.rank == 0:
        out.write_text(json.dumps(found))


def let_die(trainer: Any, death: Death) -> None:
    """Start a clock with the step, which kills this process wherever it then is."""
    train_step, started = trainer.train_step, list[bool]()

    def stepping(*data: Any) -> Any:
        if trainer.step >= death.step and not started:
            started.append(True)
            threading.Timer(death.after_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return train_step(*data)

    trainer.train_step = stepping


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
