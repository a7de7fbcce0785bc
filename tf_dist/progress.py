"""Progress of long work: bars on a terminal, periodic lines elsewhere, silent on ranks above 0.

    with progress.task("tokenizing", total=size, unit="bytes") as task:
        task.advance(n)

Like `logging` it is set up by the program, once (`begin`), and used anywhere; until then nothing is shown.
Under mpirun `isatty` tells nothing: Open MPI gives every rank a pseudo-terminal of its own. What counts is
where the launcher's output goes, and /proc knows that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from tf_dist import processes, terminal

KINDS = ("auto", "plain", "bar", "none")
HELP = "bars, plain lines, none; auto: bars on a terminal, also under mpirun [auto]"
# Seconds until a line is said of a task, and between two: of a long one at most every 2 % of its time.
EVERY_S = 5.0
SHARE = 0.02
NARROW = 80
BAR_REFRESHES_PER_S = 4
# Columns of a line for a spinner, gaps, and how far a task has come.
BESIDE_TITLE = 36
Item = TypeVar("Item")
# What launchers make of a rank's output themselves; Slurm's terminals are terminals (srun --pty).
HONEST = ("slurmstepd", "palsd")


def terminal_width(stream: int, environment: Mapping[str, str] = os.environ) -> int:
    """The columns of the terminal on which a stream (1 or 2) of this process ends up; 0: it is none."""
    if environment.get("TERM", "dumb") == "dumb":
        return 0
    launcher = _outermost_launcher()
    if launcher is None and "OMPI_COMM_WORLD_SIZE" in environment:
        return 0  # nobody knows
    if launcher is None:
        return _width_of(stream)
    name = processes.PROC / str(launcher) / "fd" / str(stream)
    with contextlib.suppress(OSError):
        if Path(os.readlink(name)).parts[:2] == ("/", "dev") and name.is_char_device():
            terminal = os.open(name, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return _width_of(terminal)
            finally:
                os.close(terminal)
    return 0


def _width_of(descriptor: int) -> int:
    try:
        # A terminal that does not know its size has 0 columns.
        return (os.get_terminal_size(descriptor).columns or NARROW) if os.isatty(descriptor) else 0
    except OSError:
        return 0


def _outermost_launcher() -> int | None:
    found, pid = None, os.getpid()
    while (above := processes.launcher_above(pid)) is not None and above.name not in HONEST:
        found = pid = above.pid
    return found


class ProgressTask:
    """Work under way. ``done`` of ``total`` in ``unit``; a total of 0: nobody knows how much it is."""

    def __init__(self, title: str, total: float = 0, unit: str = "") -> None:
        # A title may be the name of somebody's file.
        self.title, self.total, self.unit, self.done = terminal.printable(title), total, unit, 0.0
        self.begun = time.monotonic()
        self.first = 0.0  # what was done before, as by a run that is resumed

    def advance(self, amount: float = 1) -> None:
        """Count so much more as done."""
        self.done += amount

    @property
    def elapsed_s(self) -> float:
        """Since it was begun."""
        return time.monotonic() - self.begun

    @property
    def text(self) -> str:
        """How far it has come."""
        if not self.total:
            amount = f"{_amount(self.done, self.unit)}, " if self.done else ""
            return f"{amount}{_clock(self.elapsed_s)}"
        done = _amount(self.done, self.unit).split()[0]
        text = f"{done} of {_amount(self.total, self.unit)}"
        if self.done <= self.first or self.done > self.total:
            return text
        left_s = self.elapsed_s * (self.total - self.done) / (self.done - self.first)
        return f"{text}, {_clock(left_s)} left"


def _amount(number: float, unit: str) -> str:
    if unit == "bytes":
        return f"{number / 1e6:,.1f} MB"
    return f"{number:,.0f}{' ' + unit if unit else ''}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


class CountedSequence(Sequence[Item]):
    """A sequence that counts as done, for a task, how far it has been read."""

    def __init__(self, items: Sequence[Item], task: ProgressTask) -> None:
        self._items, self._task = items, task

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | Sequence[Item]:
        """What is there; what comes before it was done."""
        item = self._items[place]
        first = place.indices(len(self))[0] if isinstance(place, slice) else place
        self._task.done = max(self._task.done, first)
        return item


class NoTask:
    """Shows nothing."""

    def add(self, task: ProgressTask) -> None:
        """Show nothing."""

    def remove(self, task: ProgressTask) -> None:
        """Show nothing."""


class TaskLines:
    """A line of a task every few seconds, from a thread: most of the work is one long call."""

    def __init__(self) -> None:
        self._over: dict[int, threading.Event] = {}

    def add(self, task: ProgressTask) -> None:
        """Begin to tell of a task."""
        over = self._over[id(task)] = threading.Event()
        threading.Thread(target=_tell, args=(task, over), name="progress", daemon=True).start()

    def remove(self, task: ProgressTask) -> None:
        """Tell no more."""
        self._over.pop(id(task)).set()


def _tell(task: ProgressTask, over: threading.Event) -> None:
    while not over.wait(max(EVERY_S, SHARE * task.elapsed_s)):
        # Not on stdout, which may be somebody's data.
        terminal.write_error(f"{task.title} ... {task.text}")


def _whatever_the_terminal_does() -> contextlib.suppress:
    """It may be gone, or have no sign for a letter: no reason for work to end."""
    return contextlib.suppress(OSError, ValueError)


class TaskBars:
    """Bars of all tasks under way, at the bottom of a terminal; gone when they are done.

    Args:
        stream: 1 or 2, which ends up on it.
        width: its columns.
    """

    def __init__(self, stream: int, width: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
        from rich.table import Column

        class Plain(Console):
            """Leaves the cursor visible: a rank may end without time to bring it back. Never exits."""

            def show_cursor(self, show: bool = True) -> bool:
                return False

            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # as `print` does, where rich would end the process

        bar = max(8, min(40, (width - 64) // 2))
        cut = Column(no_wrap=True, overflow="crop", max_width=max(10, width - bar - BESIDE_TITLE))
        self._live = Progress(
            SpinnerColumn("line"),  # of ASCII, for terminals of any encoding
            TextColumn("{task.description}", markup=False, table_column=cut),
            BarColumn(bar_width=bar),
            TextColumn("{task.fields[ours].text}", markup=False, table_column=Column(no_wrap=True)),
            console=Plain(
                file=sys.stdout if stream == 1 else sys.stderr,
                force_terminal=True, width=max(20, width - 1), legacy_windows=False,
            ),
            transient=True, auto_refresh=False,
            redirect_stdout=stream == 1 or terminal_width(1) > 0, redirect_stderr=True,
        )  # fmt: skip
        self._stream = stream
        self._lock = threading.RLock()  # a signal may end all this in the middle of it
        self._shown: dict[int, tuple[ProgressTask, Any]] = {}
        self._over = threading.Event()

    def add(self, task: ProgressTask) -> None:
        """Show a bar; with the first one begins the thread that draws them."""
        with self._lock:
            bar = self._live.add_task(task.title, total=task.total or None, ours=task)
            self._shown[id(task)] = task, bar
            if len(self._shown) == 1:
                self._over = threading.Event()
                with _whatever_the_terminal_does():
                    self._live.start()
                threading.Thread(target=self._draw, args=(self._over,), name="progress", daemon=True).start()

    def remove(self, task: ProgressTask) -> None:
        """Take a bar away; with the last one the terminal is as it was found."""
        with self._lock:
            _, bar = self._shown.pop(id(task), (None, None))
            if bar is not None:
                self._live.remove_task(bar)
                if not self._shown:
                    self._over.set()
                    with _whatever_the_terminal_does():
                        self._live.stop()

    def _draw(self, over: threading.Event) -> None:
        while not over.wait(1 / BAR_REFRESHES_PER_S):
            with self._lock:
                if over.is_set():
                    return
                for task, bar in self._shown.values():
                    self._live.update(bar, completed=task.done, description=task.title)
                if terminal.is_read(self._stream):
                    with _whatever_the_terminal_does():
                        self._live.refresh()


_shown: NoTask | TaskLines | TaskBars = NoTask()
_width = 0


def begin(kind: str = "auto", first: bool = True) -> str:
    """Choose how this process shows progress, and rows of a training.

    Args:
        kind: one of `KINDS`.
        first: whether this is rank 0; others show nothing.

    Returns:
        What ``auto`` has come to; on ranks above 0 never a bar, for one of them may come to be the first.
    """
    global _shown, _width
    end()
    _width = terminal_width(1)
    if kind == "none":
        return kind
    if not first:
        return "plain"
    width = _width or terminal_width(2)
    if kind == "bar" or (kind == "auto" and width):
        with contextlib.suppress(ImportError):
            _shown = TaskBars(1 if _width else 2, width or NARROW)
            # Rows are lines where they go to a file, though a terminal shows the rest.
            return "bar" if _width or kind == "bar" else "plain"
    _shown = TaskLines()
    return "plain"


def end() -> None:
    """Show nothing from now on, and leave the terminal as it was found."""
    global _shown
    before, _shown = _shown, NoTask()
    if isinstance(before, TaskBars):
        for task, _ in list(before._shown.values()):
            before.remove(task)


@contextlib.contextmanager
def task(title: str, total: float = 0, unit: str = "") -> Iterator[ProgressTask]:
    """Show work that is under way until the block is left.

    Args:
        title: what is done, in a few words.
        total: how much there is to do; 0: nobody knows.
        unit: of the total, as in "rows"; "bytes" are shown as MB.
    """
    made, where = ProgressTask(title, total, unit), _shown
    where.add(made)
    try:
        yield made
    finally:
        where.remove(made)


def fits(line: str) -> bool:
    """Whether a line fits the terminal, if there is one."""
    return not _width or len(line) < _width


def fitted(text: str, width: int | None = None) -> str:
    """Text whose long lines are broken between words, for a narrow terminal; as it is where there is none.

    Lines that begin with a name and spaces, ``model     transformer, ...``, go on below their text.
    """
    columns = _width if width is None else width
    if not columns or len(text) < columns:
        return text
    return "\n".join(_fitted(line, columns) for line in text.split("\n"))


def _fitted(line: str, columns: int) -> str:
    if len(line) < columns:
        return line
    name, gap, _ = line.partition("  ")
    indent = len(line) - len(line[len(name) :].lstrip()) if gap and " " not in name else 0
    return textwrap.fill(
        line, columns - 1, subsequent_indent=" " * min(indent, 20), break_long_words=False,
        break_on_hyphens=False, drop_whitespace=True, replace_whitespace=False,
    )  # fmt: skip
