"""Keras's own `fit`, `evaluate` and `predict` over MPI ranks."""
