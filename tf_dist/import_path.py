"""Keep the current folder off the import path: it may be a run folder from somebody else.

Python puts that folder before all others for ``-m``: a file ``yaml.py`` in it would be taken for the package
of that name. Imported before anything else, and only this command is meant: where another program is started
by ``-m``, its folder is its own.
"""

import os.path
import sys


def leave_current_folder(path: list[str], command: list[str], package: str) -> None:
    """Take the current folder out of a path for imports, if a command is ours and does not stand beside us.

    Args:
        path: as `sys.path`.
        command: as `sys.orig_argv`.
        package: the folder of ``tf_dist`` itself.
    """
    by_m = "-m" in command[:-1] and command[command.index("-m") + 1].partition(".")[0] == "tf_dist"
    beside = os.path.realpath(os.path.dirname(package))
    if by_m and path and not sys.flags.safe_path and os.path.realpath(path[0] or ".") != beside:
        if os.path.realpath(path[0] or ".") == os.path.realpath("."):
            del path[0]


leave_current_folder(sys.path, sys.orig_argv, os.path.dirname(os.path.abspath(__file__)))
