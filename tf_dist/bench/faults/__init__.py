"""Fault campaigns from a seed, and the overhead of fault tolerance without faults."""
