"""Going on without ranks that have died: MPI's fault tolerance (ULFM, Bland et al. 2013), where it is on.

Under ``mpirun --with-ft ulfm`` a rank that is killed does not end the job: whoever talks with it gets an
error. The others *agree* whether anybody is missing, which works in spite of deaths, and *shrink* their
communicator. Where some have met the error and others still wait for them, it is *revoked* first: all are
called back.

Not for windows: what ranks share in memory is not fault tolerant.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import numpy as np
from mpi4py import MPI

# What Open MPI's mpirun tells the ranks that it starts with `--with-ft ulfm`.
SWITCH = "OMPI_MCA_mpi_ft_enable"
# Between two looks at an agreement: others may be at work for a long time yet, on the same cores.
LOOK_EVERY_S = 0.0002
# From an error that a death has caused until the death is known: some milliseconds; on a busy machine more.
TOLD_S = 5.0


def can(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether ranks can go on without one that has died."""
    return environment.get(SWITCH, "") in ("1", "true")


def prepare(environment: MutableMapping[str, str]) -> None:
    """Do without what does not outlive a death, where ranks may die; before MPI begins.

    Open MPI's collectives for several nodes ("han") free messages to a rank that dies meanwhile, which ends
    the job, or return as if nothing had happened. The simpler ones give an error.
    """
    if can(environment):
        environment.setdefault("OMPI_MCA_coll", "^han")


def is_loss(error: BaseException, mpi: Any) -> bool:
    """Whether an error of MPI means that a rank has died, or that somebody else has met such an error."""
    if not isinstance(error, MPI.Exception):
        return False
    kinds = (MPI.ERR_PROC_FAILED, MPI.ERR_PROC_FAILED_PENDING, MPI.ERR_REVOKED)
    if error.Get_error_class() in kinds:
        return True
    # Several requests at once fail as MPI_ERR_IN_STATUS, whatever the cause; and whoever has met a broken
    # connection, as MPI_ERR_OTHER, may be told of the death only then.
    deadline = time.monotonic() + TOLD_S
    while mpi.Get_failed().Get_size() == 0:
        if time.monotonic() > deadline:
            return False
        MPI.COMM_SELF.Iprobe()  # MPI hears of it only while it is at work
        time.sleep(LOOK_EVERY_S)
    return True


def dead(mpi: Any) -> list[int]:
    """The ranks of a communicator that are known to have died, ascending."""
    failed, group = mpi.Get_failed(), mpi.Get_group()
    return sorted(MPI.Group.Translate_ranks(failed, list(range(failed.Get_size())), group))


def agree(
    mpi: Any, fine: bool, limit_s: float = math.inf, meanwhile: Callable[[], object] = lambda: None
) -> bool:
    """Whether all who live are fine, and none has died; the same on all of them. It waits for all.

    ``meanwhile`` is called now and then.

    Raises:
        TimeoutError: not all have come within ``limit_s``; no agreement may follow on this communicator.
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
    """A communicator of those who live, in the old order, and the old ranks of the others; a collective."""
    new = mpi.Shrink()
    kept = MPI.Group.Translate_ranks(new.Get_group(), list(range(new.Get_size())), mpi.Get_group())
    return new, [rank for rank in range(mpi.Get_size()) if rank not in set(kept)]
