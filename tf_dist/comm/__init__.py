"""How ranks talk. The only room that imports mpi4py or horovod."""
