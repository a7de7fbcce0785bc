"""What is promised, measured: each module is one benchmark, started by ``scripts/bench.py``."""
