"""Set before anything imports Keras. Plain pytest and ``mpirun -np N python -m pytest`` both read this."""

import os

from hypothesis import settings

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# The same examples every time and on every rank: ranks that try different examples would not meet.
settings.register_profile("tf_dist", deadline=None, derandomize=True, database=None)
settings.load_profile("tf_dist")
