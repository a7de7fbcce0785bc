"""Optimizers: fused and flat updates, state, learning-rate schedules."""
