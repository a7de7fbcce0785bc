"""`as_comm`: a `Comm` from `tf_dist.connect()`'s Comm or from a communicator of mpi4py.

A raw communicator is duplicated once, and the result cached by MPI (as an attribute of the communicator):
every call with it, by any name, returns the same `Comm`. A subset of the ranks, such as the result of
``MPI.COMM_WORLD.Split``, trains by itself: its ranks wait for, and report, no rank outside it.
"""

from __future__ import annotations

import os
from typing import Any

from tf_dist.comm.runtime import launch
from tf_dist.comm.runtime.collective_order import keep_order
from tf_dist.comm.runtime.launch import connected as connected
from tf_dist.comm.transport.base import Comm, SerialComm
from tf_dist.errors import UsageError

# MPI attribute key under which a communicator caches its Comm.
_keyval: int | None = None


def as_comm(communicator: Any) -> Comm:
    """Return the `Comm` of the same ranks; a collective of them on the first call.

    Args:
        communicator: a `Comm`; or an intracommunicator of mpi4py, also of a subset of the ranks.
            ``MPI.COMM_WORLD`` stands for the result of ``tf_dist.connect()``, which is called if needed.

    Returns:
        The argument, if it is a `Comm`; the same Comm for every call with one communicator; a `SerialComm`
        for one rank.

    Raises:
        UsageError: neither of them, an intercommunicator, or one that was freed.
        LaunchError: for ``MPI.COMM_WORLD``, if `connect` refuses.
    """
    if isinstance(communicator, Comm):
        launch.is_together(communicator)
        return communicator
    mpi = _checked(communicator)
    if not mpi.Is_initialized():
        launch.join()
    if mpi.Comm.Compare(communicator, mpi.COMM_WORLD) == mpi.IDENT:
        comm = launch.connected() or launch.join()
    else:
        comm = _remembered(mpi, communicator)
    launch.is_together(comm)
    return comm


def _checked(communicator: Any) -> Any:
    """The MPI module of a raw communicator, after checking that it is usable."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library
        raise _no_ranks(communicator) from error
    if not isinstance(communicator, MPI.Comm):
        raise _no_ranks(communicator)
    if communicator == MPI.COMM_NULL:
        raise UsageError(
            "this communicator is MPI.COMM_NULL: it was freed, or Split and Create left this rank out (color "
            "MPI.UNDEFINED), which then has nothing to train with it"
        )
    if MPI.Is_finalized():
        raise UsageError("MPI is finalized already: train before MPI.Finalize()")
    if isinstance(communicator, MPI.Intercomm):
        raise UsageError("an intercommunicator has two groups of ranks: give its Merge()")
    return MPI


def _no_ranks(communicator: Any) -> UsageError:
    return UsageError(
        "the ranks are given as the Comm of tf_dist.connect(), or as a communicator of mpi4py such as "
        f"MPI.COMM_WORLD, not as {communicator!r}"
    )


def _remembered(mpi: Any, communicator: Any) -> Comm:
    global _keyval
    if _keyval is None:
        _keyval = mpi.Comm.Create_keyval()
    known = communicator.Get_attr(_keyval)
    if not isinstance(known, Comm):
        known = _made(mpi, communicator)
        communicator.Set_attr(_keyval, known)
    return known


def _made(mpi: Any, communicator: Any) -> Comm:
    group, world = communicator.Get_group(), mpi.COMM_WORLD.Get_group()
    origin = [int(rank) for rank in mpi.Group.Translate_ranks(group, None, world)]
    if communicator.Get_size() == 1:
        alone = SerialComm()
        alone.origin = origin
        return alone
    from tf_dist.comm.transport.mpi import MPIComm

    comm = MPIComm(communicator)
    comm.origin = origin
    whole = launch.connected()
    if whole is not None:
        comm.record = whole.record  # read by the watchdog
    return keep_order(comm, os.environ, communicator.Dup)
