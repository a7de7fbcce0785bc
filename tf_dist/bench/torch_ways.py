"""PyTorch baselines of the benchmarks: DDP with gloo, and one process with all cores.

    mpirun -np 2 .venv-torch/bin/python -m tf_dist.bench.torch_ways ddp gpt-0.81M out.json
    .venv-torch/bin/python -m tf_dist.bench.torch_ways one gpt-0.81M out.json
    .venv-torch/bin/python -m tf_dist.bench.torch_ways loss tiny-gpt weights.npz

Run by the Python of .venv-torch, which has no TensorFlow and no MPI: mpirun only starts the ranks, and binds
them to cores as it does ours.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from tf_dist.bench import models, torch_models

DROPPED = 3


def step_of(model: Any, rows: int, seq_len: int) -> Callable[[], None]:
    """A training step with the next of eight batches."""
    optimizer = torch_models.optimizer_of(model)
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, models.VOCABULARY, (8, rows, seq_len + 1)))
    place = 0

    def step() -> None:
        nonlocal place
        batch = ids[place % len(ids)]
        place += 1
        optimizer.zero_grad(set_to_none=True)
        torch_models.loss_of(model, batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), models.CLIP_NORM)
        optimizer.step()

    return step


def one(name: str, out: Path) -> None:
    """One process with a thread for each core, and the rows of as many ranks."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    torch.manual_seed(1)
    sizes, rows, steps = models.RECIPES[name]
    step = step_of(torch_models.build(sizes), rows * cores, sizes["seq_len"])
    taken = []
    for _ in range(DROPPED + steps):
        begun = time.perf_counter()
        step()
        taken.append(1e3 * (time.perf_counter() - begun))
    note(out, cores * rows * sizes["seq_len"], {"torch": taken[DROPPED:]})


def ddp(name: str, out: Path) -> None:
    """DistributedDataParallel over gloo, one thread a rank; times are those of the slowest rank."""
    rank, size = int(os.environ["OMPI_COMM_WORLD_RANK"]), int(os.environ["OMPI_COMM_WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.manual_seed(1)
    store = out.with_suffix(f".{os.environ['PMIX_NAMESPACE']}.store").resolve()
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    sizes, rows, steps = models.RECIPES[name]
    model = DistributedDataParallel(torch_models.build(sizes), gradient_as_bucket_view=True)
    step = step_of(model, rows, sizes["seq_len"])
    taken = []
    for _ in range(DROPPED + steps):
        distributed.barrier()
        begun = time.perf_counter()
        step()
        mine = torch.tensor(1e3 * (time.perf_counter() - begun))
        distributed.all_reduce(mine, distributed.ReduceOp.MAX)
        taken.append(float(mine))
    if rank == 0:
        note(out, size * rows * sizes["seq_len"], {"ddp": taken[DROPPED:]})
    distributed.barrier()
    if rank == 0:
        store.unlink(missing_ok=True)
    os._exit(0)  # gloo's threads now and then abort an orderly end


def note(out: Path, tokens: int, times_ms: dict[str, list[float]]) -> None:
    """Leave what `tf_dist.bench.step` reads."""
    out.write_text(json.dumps({"tokens": tokens, "times_ms": times_ms, "version": torch.__version__}))


def loss(name: str, file: Path) -> None:
    """Print the loss, and the norm of its gradient, of a batch ``x``, ``y`` with the weights of a file."""
    with np.load(file) as arrays:
        weights = {key: arrays[key] for key in arrays.files}
    x_BxT, y_BxT = (torch.from_numpy(weights.pop(key).astype(np.int64)) for key in ("x", "y"))
    model = torch_models.build(models.RECIPES[name].sizes)
    torch_models.load(model, weights)
    found = torch_models.loss_of(model, x_BxT, y_BxT)
    found.backward()
    # The second bias of an LSTM is no parameter of Keras's.
    gradients = [p.grad for n, p in model.named_parameters() if "bias_hh" not in n]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    print(json.dumps({"loss": float(found), "gradient_norm": float(norm)}))


if __name__ == "__main__":
    {"one": one, "ddp": ddp, "loss": loss}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
