"""Train Keras language models on every core you can reach with ``mpirun``."""

from tf_dist.version import __version__ as __version__
