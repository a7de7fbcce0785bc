"""Where log records of the package go: on the console of one rank, unless a program wants them elsewhere."""

import logging
import subprocess
import sys
import threading

import pytest

from tf_dist.comm.runtime import launch, log_handlers
from tf_dist.comm.runtime.log_handlers import FirstRank, once, show, shown_by
from tf_dist.comm.transport.base import SerialComm

# A module's logger below that of the package; pytest knows neither.
LOG = logging.Logger("tf_dist.somewhere")


def rank(number):
    comm = SerialComm()
    comm.rank = number
    return comm


@pytest.fixture(autouse=True)
def as_at_the_start(monkeypatch):
    LOG.parent = logging.Logger("tf_dist")
    LOG.parent.parent = logging.getLogger()
    monkeypatch.setattr(log_handlers, "LOGGER", LOG.parent)
    monkeypatch.setattr(launch, "_connected", None)
    log_handlers.install()
    LOG._cache.clear()


def test_messages_are_printed_where_standard_output_is_now(capsys):
    LOG.info("100 % \x1b[31mred")
    LOG.debug("too much")
    assert capsys.readouterr() == ("100 % \\x1b[31mred\n", "")


def test_one_rank_prints(capsys, monkeypatch):
    monkeypatch.setattr(launch, "_connected", rank(2))
    LOG.info("of the job")
    once(LOG, rank(1)).info("of another group")
    once(LOG, rank(0)).info("of its own group")
    assert capsys.readouterr().out == "of its own group\n"


def test_ranks_are_those_of_now(capsys):
    comm = rank(1)
    log = once(LOG, comm)
    log.info("before")
    comm.rank = 0
    log.info("after a death")
    assert capsys.readouterr().out == "after a death\n"


def test_a_program_silences_or_takes_over(capsys, caplog):
    seen = []
    logger = log_handlers.LOGGER
    handler = log_handlers.ConsoleHandler(seen.append)
    logger.addHandler(handler)
    LOG.info("to a handler")
    logger.removeHandler(handler)
    logger.propagate = True
    LOG.info("to the root logger")
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    LOG._cache.clear()  # as the level of a logger that has a name does
    LOG.info("unwanted")
    LOG.warning("wanted")
    assert (seen, caplog.messages) == (["to a handler"], ["to the root logger"])
    assert capsys.readouterr().out == "wanted\n"


def test_a_handler_of_a_program_hears_one_rank_if_it_wants(monkeypatch):
    record = logging.LogRecord("tf_dist", logging.INFO, "", 1, "text", (), None)
    assert FirstRank().filter(record)
    monkeypatch.setattr(launch, "_connected", rank(1))
    assert not FirstRank().filter(record)


def test_what_a_program_has_set_stays(monkeypatch):
    mine, theirs = logging.NullHandler(), logging.Logger("tf_dist", logging.ERROR)
    theirs.addHandler(mine)
    monkeypatch.setattr(log_handlers, "LOGGER", theirs)
    log_handlers.install()
    assert (theirs.handlers, theirs.level, theirs.propagate) == ([mine], logging.ERROR, True)


def test_a_command_prints_by_its_own_function(capsys):
    seen, other = [], []
    show(seen.append)
    LOG.info("one")
    with shown_by(other.append, "tf_dist run: %(message)s"):
        LOG.info("two")
    LOG.info("three")
    assert (seen, other) == (["one", "three"], ["tf_dist run: two"])
    assert capsys.readouterr().out == ""


def test_a_printer_may_wait_for_a_thread_that_logs():
    seen = []

    def write(text):
        if text == "first":
            thread = threading.Thread(target=LOG.info, args=["of the thread"], daemon=True)
            thread.start()
            thread.join(10)
            assert not thread.is_alive()
        seen.append(text)

    show(write)
    LOG.info("first")
    assert seen == ["of the thread", "first"]


def test_what_a_printer_raises_ends_the_program():
    def write(text):
        raise OSError("no room")

    show(write)
    with pytest.raises(OSError, match="no room"):
        LOG.info("text")


SCRIPT = """
import logging
{before}
import tf_dist
{after}
logging.getLogger("tf_dist.anything").info("text")
"""


@pytest.mark.parametrize(
    ("before", "after", "out", "err"),
    [
        ("", "", "text\n", ""),
        ("logging.basicConfig(level=logging.INFO)", "", "text\n", ""),
        ("", "logging.basicConfig(level=10); logging.getLogger('tf_dist').propagate = True", "",
         "INFO:tf_dist.anything:text\n"),
        ("", "logging.getLogger('tf_dist').addHandler(logging.StreamHandler())", "", "text\n"),
        ("logging.getLogger('tf_dist').addHandler(logging.StreamHandler())", "", "", "text\n"),
        ("", "logging.getLogger('tf_dist').setLevel('WARNING')", "", ""),
    ],
)  # fmt: skip
def test_scripts(before, after, out, err):
    script = SCRIPT.format(before=before, after=after)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, out, err)
