"""What jobs of the benchmarks leave, as they would: numbers that are easy to reckon with."""


def step_job(**times_ms):
    found = {"tokens": 1000, "times_ms": {way.replace("_", " "): times for way, times in times_ms.items()}}
    if "ours" in times_ms:
        found["parts_ms"] = {"input": 0.1, "forward+backward": 8.0, "pack": 0.2, "update": 1.0, "step": 10.0}
    return found


def step_model():
    """A model of `bench-step`: ours twice as fast as Keras, four times as fast as Horovod's best."""
    rows = [
        *((1, "ours", 10.0), (2, "ours", 10.0), (2, "ours xla", 5.0), (2, "ours bfloat16", 4.0)),
        *((2, "alone", 9.5), (2, "compute", 9.9), (2, "horovod", 50.0)),
        *((2, "horovod HOROVOD_CYCLE_TIME=10", 40.0), (2, "ddp", 15.0), (0, "fit plain", 20.0)),
        *((0, "fit xla", 16.0), (0, "torch", 12.0)),
    ]
    keys = ("ranks", "way", "median_ms", "tokens_per_s", "steps")
    return {
        "rows": [dict(zip(keys, (*row, 1e6 / row[2], 12), strict=True)) for row in rows],
        "horovod_sweep_ms": {"HOROVOD_CYCLE_TIME=10": 40.0},
        "parts_ms": {"2": {"input": 0.1, "forward+backward": 8.0, "step": 10.0}},
        "gemm": {"np 2": {"peak_gflops": 100.0, "step": 0.8, "forward+backward": 0.9}},
        "absent": {"MultiWorkerMirroredStrategy, own loop, ring": "a reason"},
    }


def comm_job(ranks=2):
    sizes = (4 << 10, 4 << 20, 64 << 20, 256 << 20)
    ratios = (1.0, 5.0, 6.0, 2.0)  # of MPI's time to ours
    sums = [
        {"bytes": size, "limit": 0.9, "ours": 1.0, "mpi": ratio}
        for size, ratio in zip(sizes, ratios, strict=True)
    ]
    return {"ranks": ranks, "sums": sums}


def memory_job(pss=900e6):
    rank = {
        "baseline_pss": 300e6,
        "baseline_rss": 500e6,
        "peak_pss": pss,
        "peak_rss": 1e9,
        "whole_rss": 1.1e9,
    }
    return {"name": "gpt-0.81M", "ranks": 2, "parameters": 809_856, "of_ranks": [rank, rank]}


def nanogpt_runs():
    def run(seconds, losses):
        points = [[250 * (i + 1), seconds * (i + 1), loss] for i, loss in enumerate(losses)]
        return {"points": points, "startup_s": 5.0, "whole_s": 100.0}

    return {
        "ours": [run(10.0, [2.0, 1.9, 1.86]), run(12.0, [2.0, 1.9, 1.86])],
        "torch": [run(20.0, [2.0, 1.9, 1.86]), run(20.0, [2.0, 1.9, 1.86])],
    }
