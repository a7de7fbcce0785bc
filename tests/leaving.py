"""How processes of tests end: at once.

Python takes a second of a core to take TensorFlow down; after hundreds of traced functions, a minute.
"""

import atexit
import os
import sys
import threading
import traceback


def leave(status):
    """End this process as Python does, but for the objects that it still has.

    Args:
        status: its exit code.
    """
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # nobody reads any more, or it was closed
            pass
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    os._exit(status)


def status_of(program):
    """Call what a script is; what Python would exit with after it."""
    try:
        try:
            program()
        except SystemExit:
            raise
        except BaseException:
            sys.excepthook(*sys.exc_info())  # ours raises SystemExit
            return 1
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return (ended.code or 0) & 0xFF
        print(ended.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
