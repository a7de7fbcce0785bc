"""Where log records of ``tf_dist`` go: the first rank prints them on the console.

Modules log to ``logging.getLogger(__name__)``, on every rank that knows of something. In a user's script the
first rank prints a record's message on standard output, and nothing needs to be configured. To change that:

    logging.getLogger("tf_dist").setLevel(logging.WARNING)    # warnings only
    logging.getLogger("tf_dist").addHandler(handler)          # instead of the console, on every rank
    logging.getLogger("tf_dist").propagate = True             # instead, to the handlers of the root logger

A command says by `show` or `shown_by` where its messages go.

The last words of a rank (`job_exit`, `tf_dist.comm.health.watchdog`) are not records: they come from threads
and signal handlers of processes that are about to end, and must depend on no lock and no configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tf_dist.comm.runtime import console
from tf_dist.comm.runtime.launch import connected
from tf_dist.comm.transport.base import Comm

if TYPE_CHECKING:
    Adapter = logging.LoggerAdapter[logging.Logger]

LOGGER = logging.getLogger("tf_dist")
MESSAGE = "%(message)s"


def once(log: logging.Logger, comm: Comm) -> Adapter:
    """A logger for what all ranks of ``comm`` know: its first rank prints it.

    Records of other loggers are printed by the first rank of the job.
    """
    return logging.LoggerAdapter(log, {"comm": comm})


class FirstRank(logging.Filter):
    """Passes records on one rank: the first one of the record's Comm (`once`), else of the job.

    Ranks are those of now: after a death the rank that has become the first one prints.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this is the first rank; before a process has joined the others, it is."""
        comm: Comm | None = getattr(record, "comm", None) or connected()
        return comm is None or comm.rank == 0


class ConsoleHandler(logging.Handler):
    """Gives messages to a function that prints them, on the first rank.

    It has no lock, for the function may wait for a thread that logs as well (`RunFolder.say` does). What the
    function raises is raised where the message was logged.

    Args:
        write: prints a line.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        super().__init__()
        self.write = write
        self.addFilter(FirstRank())

    def createLock(self) -> None:
        """No lock, as in `logging.NullHandler`."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Print a message."""
        self.write(self.format(record))


class DefaultHandler(ConsoleHandler):
    """Prints on the console, unless the program has said where messages of ``tf_dist`` go."""

    def __init__(self) -> None:
        super().__init__(console.say)
        self.addFilter(lambda record: LOGGER.handlers == [self] and not LOGGER.propagate)


def install() -> None:
    """Let messages be printed on the console; called by ``import tf_dist``.

    A logger that the program has given handlers or a level keeps them. Records go on to the root logger only
    where that is asked for: absl, which Keras logs by, gives it a handler when it first warns, and from then
    on every line would come twice.
    """
    if LOGGER.level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    if not LOGGER.handlers:
        LOGGER.addHandler(DefaultHandler())
        LOGGER.propagate = False


def show(write: Callable[[str], object], line: str = MESSAGE) -> None:
    """Print the messages of a command by ``write`` from now on, whatever handlers a user's code adds.

    Args:
        write: prints a line.
        line: its format, as of `logging.Formatter`.
    """
    handler = ConsoleHandler(write)
    handler.setFormatter(logging.Formatter(line))
    LOGGER.handlers[:] = [one for one in LOGGER.handlers if not isinstance(one, ConsoleHandler)] + [handler]


@contextmanager
def shown_by(write: Callable[[str], object], line: str = MESSAGE) -> Iterator[None]:
    """`show`, until the block is left."""
    before = LOGGER.handlers[:]
    show(write, line)
    try:
        yield
    finally:
        LOGGER.handlers[:] = before
