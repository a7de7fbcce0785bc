"""Distributed algorithms: partitioning, reduction, schedules. Take a Comm, never make one; no TensorFlow."""
