"""Pipeline parallelism: partitioning of a model into stages, and execution of a schedule by each stage."""
