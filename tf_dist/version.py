"""The one place the version is written; importing it imports nothing else."""

__version__ = "0.1.0"
