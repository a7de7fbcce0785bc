"""Tests of Keras that do not end over ranks as they do in one process, each with its reason."""

import re

# Patterns of tests' names, and what ranks they are for ("all": also for one).
EXCEPTIONS = {}


def reason_for(test, np_):
    """Why a test may end otherwise; None: it may not."""
    for pattern, (ranks, reason) in EXCEPTIONS.items():
        if re.search(pattern, test) and (ranks == "all" or np_ > 1):
            return reason
    return None
