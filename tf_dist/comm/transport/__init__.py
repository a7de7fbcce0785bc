"""Transports: the Comm interface over MPI, shared memory and Horovod, and the reduction order."""
