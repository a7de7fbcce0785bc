"""ULFM: continue without failed ranks, by MPI's fault tolerance (Bland et al. 2013), where it is enabled.

Under ``mpirun --with-ft ulfm`` a killed rank does not end the job: ranks that communicate with it get an
error. The survivors *agree* whether a rank is missing, which works despite failures, and *shrink* their
communicator. If some have seen the error and others still wait for them, it is *revoked* first, which raises
an error on all.

Not for windows: shared memory is not fault tolerant.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
from mpi4py import MPI

# Set by Open MPI's mpirun for ranks that it starts with `--with-ft ulfm`.
SWITCH = "OMPI_MCA_mpi_ft_enable"
# Polling interval of an agreement: others may compute for a long time yet, on the same cores.
LOOK_EVERY_S = 0.0002
# Delay between an error caused by a failure and MPI's report of it: milliseconds; on a busy machine more.
TOLD_S = 5.0


def can(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ranks can continue without a failed one."""
    return environment.get(SWITCH, "") in ("1", "true")


def prepare(environment: MutableMapping[str, str]) -> None:
    """Disable components that do not survive a failure, if ranks may fail; before MPI is initialized.

    Open MPI's hierarchical collectives ("han") free messages to a rank that fails meanwhile, which ends
    the job, or return without an error. The simpler ones raise an error.
    """
    if can(environment):
        environment.setdefault("OMPI_MCA_coll", "^han")


def is_loss(error: BaseException, mpi: Any) -> bool:
    """Whether an MPI error means that a rank has failed, or that another rank has seen such an error."""
    if not isinstance(error, MPI.Exception):
        return False
    kinds = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
    if error.Get_error_class() in kinds:
        return True
    # Several requests at once fail as MPI_ERR_IN_STATUS, whatever the cause; and a broken connection,
    # reported as MPI_ERR_OTHER, may precede the report of the failure.
    deadline = time.monotonic() + TOLD_S
    while mpi.Get_failed().Get_size() == 0:
        if time.monotonic() > deadline:
            return False
        MPI.COMM_SELF.Iprobe()  # MPI detects failures only while it progresses
        time.sleep(LOOK_EVERY_S)
    return True


def dead(mpi: Any) -> list[int]:
    """The ranks of a communicator that are known to have failed, ascending."""
    failed, group = mpi.Get_failed(), mpi.Get_group()
    return sorted(MPI.Group.Translate_ranks(failed, list(range(failed.Get_size())), group))


def agree(
    mpi: Any, fine: bool, limit_s: float = math.inf, meanwhile: Callable[[], object] = lambda: None
) -> bool:
    """Whether all survivors are fine, and no rank has failed; the same on all of them. Waits for all.

    ``meanwhile`` is called repeatedly while it waits.

    Raises:
        TimeoutError: some did not arrive within ``limit_s``; no agreement may follow on this communicator.
    """
    deadline = time.monotonic() + limit_s
    flag = np.array([int(fine)], np.int32)
    try:
        request = mpi.Iagree(flag)
        while not request.Test():
            if time.monotonic() > deadline:
                raise TimeoutError
            meanwhile()
            time.sleep(LOOK_EVERY_S)
    except MPI.Exception as error:
        if not is_loss(error, mpi):
            raise
        return False
    return bool(flag[0])


def shrink(mpi: Any) -> tuple[Any, list[int]]:
    """A communicator of the survivors, in the old order, and the old ranks of the failed; a collective."""
    new = mpi.Shrink()
    kept = MPI.Group.Translate_ranks(new.Get_group(), list(range(new.Get_size())), mpi.Get_group())
    return new, [rank for rank in range(mpi.Get_size()) if rank not in set(kept)]
