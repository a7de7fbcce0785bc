"""`as_comm`: a `Comm` of whatever a script has at hand, `tf_dist.connect()`'s or a communicator of mpi4py.

A raw communicator is duplicated once, and remembered by MPI itself (an attribute of the communicator): every
call with it, by whichever name, gives the same `Comm`. A part of the ranks, as ``MPI.COMM_WORLD.Split`` gives
it, trains by itself: its ranks wait for, and accuse, nobody else.
"""

from __future__ import annotations

import os
from typing import Any

from tf_dist.comm import launch
from tf_dist.comm.base import Comm, SerialComm
from tf_dist.comm.debug import keep_order
from tf_dist.comm.launch import connected as connected
from tf_dist.errors import UsageError

# Under this key MPI keeps our Comm with the communicator that it was made of.
_keyval: int | None = None


def as_comm(communicator: Any) -> Comm:
    """The `Comm` that means the same ranks; a collective of them, where it is called with them first.

    Args:
        communicator: a `Comm`; or an intracommunicator of mpi4py, also one of a part of the ranks.
            ``MPI.COMM_WORLD`` is what ``tf_dist.connect()`` has given, and connects where nobody has.

    Returns:
        A `Comm` itself; the same one for every call with one communicator; a `SerialComm` for one rank.

    Raises:
        UsageError: neither of them, an intercommunicator, or one that was freed.
        LaunchError: ``MPI.COMM_WORLD``, and `connect` refuses.
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
    """The module of a raw communicator that can be used."""
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
    from tf_dist.comm.mpi import MPIComm

    comm = MPIComm(communicator)
    comm.origin = origin
    whole = launch.connected()
    if whole is not None:
        comm.record = whole.record  # where the watchdog looks
    return keep_order(comm, os.environ, communicator.Dup)
