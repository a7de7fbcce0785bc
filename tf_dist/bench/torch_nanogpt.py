"""nanoGPT's recipe for a CPU in PyTorch, on all cores in one process: the peer of `tf_dist.bench.nanogpt`.

    .venv-torch/bin/python -m tf_dist.bench.torch_nanogpt text.txt 2000 250 1 out.json

(steps, steps between evaluations, seed). Batches are drawn at random places of the text, as nanoGPT does; the
last tenth of the characters is held out, and all of it is evaluated. Run by the Python of .venv-torch.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tf_dist.bench import models, torch_models

SIZES, ROWS = models.GPT_SMALL, 12
HELD_OUT = 0.1
PEAK, END, WARMUP, DECAY = 1e-3, 1e-4, 100, 0.1
EVALUATED_ROWS = 64


def characters(path: Path) -> tuple[Any, Any, int]:
    """Token ids for training and held out, and the number of different characters."""
    text = path.read_text(encoding="utf-8")
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    ids = torch.from_numpy(np.array([known[character] for character in text]))
    first_held_out = int(len(ids) * (1 - HELD_OUT))
    return ids[:first_held_out], ids[first_held_out:], len(known)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to END; ``step`` counts from 0."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return END + (PEAK - END) * (1 + math.cos(math.pi * done)) / 2


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    """AdamW with nanoGPT's numbers: matrices decay, vectors do not."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), fused=True)


@torch.no_grad()  # type: ignore[untyped-decorator]
def evaluate(model: Any, held_out: Any) -> float:
    """Mean loss of all held-out sequences, in nats."""
    seq_len = int(SIZES["seq_len"])
    count = (len(held_out) - 1) // seq_len
    x = held_out[: count * seq_len].view(count, seq_len)
    y = held_out[1 : count * seq_len + 1].view(count, seq_len)
    total = 0.0
    for at in range(0, count, EVALUATED_ROWS):
        rows = slice(at, at + EVALUATED_ROWS)
        total += float(torch_models.loss_of(model, x[rows], y[rows])) * len(x[rows])
    return float(total / count)


def main(text: str, steps: int, every: int, seed: int, out: Path) -> None:
    """Train; leave the evaluations as (step, seconds of training, loss), and when the first step began."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(seed)
    training, held_out, vocabulary = characters(Path(text))
    model = torch_models.build(SIZES, vocabulary)
    optimizer = optimizer_of(model)
    seq_len = SIZES["seq_len"]
    window = torch.arange(seq_len)
    points, trained_s, begun_at = [], 0.0, time.time()
    for step in range(steps):
        begun = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        starts = torch.randint(len(training) - seq_len, (ROWS, 1))
        optimizer.zero_grad(set_to_none=True)
        torch_models.loss_of(model, training[starts + window], training[starts + window + 1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        trained_s += time.perf_counter() - begun
        if (step + 1) % every == 0 or step + 1 == steps:
            points.append([step + 1, trained_s, evaluate(model, held_out)])
            print(points[-1], flush=True)
    out.write_text(json.dumps({"points": points, "begun_at": begun_at, "version": torch.__version__}))


if __name__ == "__main__":
    steps, every, seed = map(int, sys.argv[2:5])
    main(sys.argv[1], steps, every, seed, Path(sys.argv[5]))
