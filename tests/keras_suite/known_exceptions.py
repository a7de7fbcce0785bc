"""Tests of Keras that do not end over ranks as they do in one process, each with its reason."""

import re

# Patterns of tests' names, and what ranks they are for: "all", or "several", where a test would end the job,
# because rank 1 fails while rank 0 goes on, and is left out.
EXCEPTIONS = {
    r"backup_and_restore_test.py::.*::test_(best_case|backup_corrupted|model_deleted)": (
        "several",
        "asks the callback what it has counted: rank 0's alone runs, the others stay as they were made",
    ),
    r"swap_ema_weights_test.py::.*::test_swap_ema_weights(_with_loss_scale_optimizer)?$": (
        "all",
        "asks for equal bits of fit's validation and evaluate: fit's is taken from sums in float64",
    ),
    r"terminate_on_nan_test.py::.*raise_error": (
        "several",
        "one row: rank 1 has none, does not see its loss before the epoch ends, and waits for rank 0",
    ),
    r"remote_monitor_test.py::.*::test_RemoteMonitor": (
        "all",
        "asks on each rank what the callback has sent: rank 0's alone sends",
    ),
    r"test_fit_sparse_tf_eager": (
        "all",
        "a thread draws its data by tf.random, while a step that runs eagerly has the seed of its rank",
    ),
    r"optimizer_sparse_test.py::.*::test_sparse_gradients": (
        "all",
        "asks that only the optimizer assigns variables: the first step begins with the state of rank 0",
    ),
    r"_with_tf_distribute|test_distributed_datasets_from_function_model_integration": (
        "all",
        "trains under tf.distribute, which shares out a batch as the ranks do: not both at once",
    ),
}


def is_left_out(test, np_):
    """Whether a test is not even run on ``np_`` ranks."""
    several = [pattern for pattern, (ranks, _) in EXCEPTIONS.items() if ranks == "several"]
    return np_ > 1 and any(re.search(pattern, test) for pattern in several)


def reason_for(test, np_):
    """Why a test may end otherwise; None: it may not."""
    for pattern, (ranks, reason) in EXCEPTIONS.items():
        if re.search(pattern, test) and (ranks == "all" or np_ > 1):
            return reason
    return None
