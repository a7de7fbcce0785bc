# Sourced by the Makefile, and at the end of .venv/bin/activate: lets plain `mpirun -np N` work.

# More ranks than cores are allowed (Open MPI 5 refuses them by default). MPICH needs nothing.
export PRTE_MCA_rmaps_default_mapping_policy="${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}"

# Open MPI refuses root. In a container root is the usual user, so there, and only there, it is allowed.
if [ "$(id -u)" = 0 ] && [ -z "${OMPI_ALLOW_RUN_AS_ROOT:-}" ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
