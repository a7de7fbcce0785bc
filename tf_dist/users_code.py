"""Import user code by ``package.module:name``: only what a command line names (`run_options.check_named`)."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from tf_dist.errors import UsageError


def imported(name: str, flag: str) -> Any:
    """A function or class of a user.

    Args:
        name: ``package.module:name``.
        flag: that has named it.

    Raises:
        UsageError: it cannot be found.
    """
    module_name, _, attribute = name.partition(":")
    # `tf-dist` and scripts have their own folders on the path, not the one the user stands in. That comes
    # last: a file in that folder, which may be a stranger's, is not taken for an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UsageError(f"{flag} {name}: {error}. It is looked for from the current folder") from error
