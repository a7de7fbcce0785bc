"""Whether tests run that repeat others: on more ranks, of more kinds and sizes."""

import os

EVERYTHING = os.environ.get("TF_DIST_TESTS") == "all"
