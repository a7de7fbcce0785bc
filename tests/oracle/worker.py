"""Runs user scripts one after another in one process: ``worker.py FOLDER ranks|plain SCRIPT...``.

A launch and an import of TensorFlow cost more than a small training, so many scripts share them. Each
is executed as ``__main__`` would be, in a folder of its own, and leaves what it has put into ``results``.
With ``ranks`` all ranks run all scripts, and meet after each one.
"""

import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from leaving import leave

# How long a rank whose script has failed waits for the others to come out of theirs.
FAILED_WAITS_S = 60
STALL_WARN_S, STALL_ABORT_S = 60, 180


def flat(value, name=""):
    """A nest of numbers and arrays as ``{"history/loss": array}``."""
    import numpy as np

    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, (list, tuple)) and any(np.ndim(one) or isinstance(one, dict) for one in value):
        pairs = enumerate(value)
    else:
        return {name: np.asarray(value, np.float64)}
    return {key: array for k, v in pairs for key, array in flat(v, f"{name}/{k}" if name else str(k)).items()}


def steps_of(namespace):
    """The most steps that any optimizer a script has at hand has taken."""
    import keras

    found = []
    for value in list(namespace.values()):
        parts = [value, *vars(value).values()] if isinstance(value, keras.Model) else [value]
        found += [one for one in parts if isinstance(one, keras.optimizers.Optimizer)]
    return max([int(one._iterations) for one in found], default=0)


def run(script, folder):
    """Execute a script; its record (a dictionary for JSON) and its results."""
    import keras
    import tensorflow as tf

    keras.backend.clear_session()
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    begun, namespace, results = time.monotonic(), {"__name__": "__main__", "__file__": str(script)}, {}
    record = {"status": "done", "message": "", "by_value": True}
    try:
        exec(compile(script.read_text(), str(script), "exec"), namespace)
        results = flat(namespace["results"])
        record["by_value"] = namespace.get("by_value", True)
    except BaseException as error:
        record |= failure(error) | {"trace": traceback.format_exc(), "steps": steps_of(namespace)}
    namespace.clear()
    tf.config.run_functions_eagerly(False)
    gc.collect()
    return record | {"seconds": time.monotonic() - begun}, results


def failure(error):
    """Whether an error is one of tf_dist's own, and what it says."""
    errors = sys.modules.get("tf_dist.errors")
    if errors is not None:
        error = errors.behind(error)
    ours = errors is not None and isinstance(error, errors.TfDistError)
    return {"status": "refused" if ours else "crashed", "message": f"{type(error).__name__}: {error}"[:2000]}


def save(path, record, results):
    import numpy as np

    np.savez(f"{path}.npz", **{name.replace("/", "|"): array for name, array in results.items()})
    Path(f"{path}.json").write_text(json.dumps(record))


def meet(world, record):
    """Wait for all ranks; one whose script has failed ends the job where the others stay inside theirs."""
    request, deadline = world.Ibarrier(), time.monotonic() + FAILED_WAITS_S
    while not request.Test():
        if record["status"] != "done" and time.monotonic() > deadline:
            print(f"rank {world.rank}: the others do not come out of this script", flush=True)
            world.Abort(9)
        time.sleep(0.002)


def main():
    folder, mode, scripts = Path(sys.argv[1]), sys.argv[2], [Path(name) for name in sys.argv[3:]]
    world, rank = None, 0
    if mode == "ranks":
        import tf_dist

        comm = tf_dist.connect(stall_warn=STALL_WARN_S, stall_abort=STALL_ABORT_S)
        tf_dist.connect = lambda *_, **__: comm  # once in a process; each script calls it
        from mpi4py import MPI

        world, rank = MPI.COMM_WORLD.Dup(), comm.rank
    else:
        import plain_tf_dist

        sys.modules["tf_dist"] = plain_tf_dist
    for script in scripts:
        if rank == 0:
            print(f"--- {script.stem}", flush=True)
        record, results = run(script, folder / f"{script.stem}.files")
        save(folder / f"{script.stem}.{rank if world else 'plain'}", record, results)
        if world:
            meet(world, record)


if __name__ == "__main__":
    main()
    leave(0)
