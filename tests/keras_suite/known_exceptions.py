"""Tests of Keras that do not end over ranks as they do in one process, each with its reason."""

import re

# Patterns of tests' names, and what ranks they are for ("all": also for one).
EXCEPTIONS = {
    r"swap_ema_weights_test.py::.*::test_swap_ema_weights(_with_loss_scale_optimizer)?$": (
        "all",
        "asks for equal bits of fit's validation and evaluate: fit's is taken from sums in float64",
    ),
    r"swap_ema_weights_test.py::.*_with_tf_distribute": (
        "all",
        "trains under tf.distribute, which shares out a batch as the ranks do: not both at once",
    ),
}


def reason_for(test, np_):
    """Why a test may end otherwise; None: it may not."""
    for pattern, (ranks, reason) in EXCEPTIONS.items():
        if re.search(pattern, test) and (ranks == "all" or np_ > 1):
            return reason
    return None
