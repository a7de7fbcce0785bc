"""Benchmarks of every documented figure; one module each, started by ``scripts/bench.py``."""
