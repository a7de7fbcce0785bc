"""Hosts named by an mpirun command, and which of them answer: a job can continue without the others.

Understood are what Open MPI and MPICH share: ``--host a:2,b:2`` and ``--hostfile FILE`` with a line for each
host, as ``a slots=2`` or ``a:2``. Under Slurm there is nothing to do here: it gives another job other hosts.
"""

from __future__ import annotations

import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from tf_dist.config.parallelism import ParallelismOptions
from tf_dist.errors import LaunchError, UsageError
from tf_dist.flags import options_among
from tf_dist.untrusted_files import read_bytes, shown

LOG = logging.getLogger(__name__)
LISTS = ("--host", "-host", "-H", "--hosts", "-hosts")
FILES = ("--hostfile", "-hostfile", "--machinefile", "-machinefile", "-f")
AGENTS = ("plm_ssh_agent", "plm_rsh_agent")
# Open MPI's words for the ranks that a host takes, and those of PBS; not max-slots, how many it may be given.
SLOTS = r"(?<![\w-])(?:slots|count|cpus?|ppn|np)"
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10"
# A name or an address, perhaps after a user's name; nothing that a program or a shell takes for more.
NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_+][A-Za-z0-9_.-]*", re.ASCII)
HOSTFILE_LIMIT_BYTES = 1 << 20
MOST_SLOTS = 1_000_000
# How long a host may take to answer.
ANSWER_S = 20.0


class Host(NamedTuple):
    """A host, and how many ranks it takes; 0 where that is not said."""

    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}" if self.slots else self.name


def named_in(flags: Sequence[str]) -> tuple[list[Host], list[str]]:
    """The hosts that flags of mpirun name, and the other flags.

    Raises:
        LaunchError: the file of hosts cannot be read.
    """
    hosts, others, left = list[Host](), list[str](), list(flags)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag not in LISTS + FILES or not (equals or left):
            others.append(flag + equals + value)
            continue
        value = value if equals else left.pop(0)
        hosts += [_host(one) for one in (value.split(",") if flag in LISTS else _lines(Path(value)))]
    return hosts, others


def _lines(path: Path) -> list[str]:
    try:
        text = read_bytes(path, HOSTFILE_LIMIT_BYTES, follow=True).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise LaunchError(f"cannot read the hosts in {path}: {error.strerror}") from error
    return [line for line in (line.partition("#")[0].strip() for line in text.splitlines()) if line]


def _host(text: str) -> Host:
    found = re.fullmatch(rf"([^\s:]+)(?::(\d+))?(?:.*{SLOTS}\s*=\s*(\d+))?.*", text.strip(), re.ASCII)
    if found is None:
        raise LaunchError(f"{shown(text)} is no host: write NAME:RANKS, or in a file NAME slots=RANKS")
    if not NAME.fullmatch(found[1]):
        raise LaunchError(
            f"{shown(found[1])} is no name of a host: letters, digits, dots, dashes and underscores are, and "
            "the first one is no dash, or ssh would take it for an option"
        )
    return Host(found[1], min(int((found[2] or found[3] or "0")[:7]), MOST_SLOTS))


def agent_of(flags: Sequence[str]) -> list[str]:
    """The command with which mpirun reaches other hosts, from its flags; ssh by default."""
    for name, value in pairwise(flags):
        if name in AGENTS:
            return value.split()
    return SSH.split()


def those_that_answer(hosts: Sequence[Host], agent: Sequence[str], limit_s: float = ANSWER_S) -> list[Host]:
    """The hosts on which a command can be run now. This one always can.

    Args:
        hosts: to be asked, all at once.
        agent: a command that takes the name of a host and a command.
        limit_s: seconds after which there is no answer.
    """
    asked = {host: _ask(host, agent) for host in dict.fromkeys(hosts) if host.name not in own_names()}
    deadline, silent = time.monotonic() + limit_s, set[Host]()
    for host, process in asked.items():
        if process is None:
            continue
        try:
            if process.wait(max(0.0, deadline - time.monotonic())):
                silent.add(host)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            silent.add(host)
    return [host for host in hosts if host not in silent]


def _ask(host: Host, agent: Sequence[str]) -> subprocess.Popen[bytes] | None:
    quiet = subprocess.DEVNULL
    try:
        return subprocess.Popen([*agent, host.name, "true"], stdin=quiet, stdout=quiet, stderr=quiet)
    except OSError:  # nobody knows: mpirun may have ways of its own
        return None


def own_names() -> set[str]:
    """What this host may be called."""
    name = socket.gethostname()
    return {"localhost", "127.0.0.1", "::1", name, name.partition(".")[0]}


def ranks_on(hosts: Sequence[Host], of: Sequence[Host], ranks: int, together: int = 1) -> int:
    """How many ranks to start on some of the hosts on which there were ``ranks``.

    Args:
        hosts: those that are left.
        of: all of them.
        ranks: on all.
        together: ranks that share a model: only multiples of it can train.
    """
    if all(host.slots for host in hosts):
        left = min(ranks, sum(host.slots for host in hosts))
    else:
        left = ranks * len(hosts) // len(of)
    return left // together * together


class Launch(NamedTuple):
    """How a job of Python is started.

    words: a script and its flags. ranks: wanted. least: with fewer it is not started. flags: of mpirun.
    """

    words: list[str]
    ranks: int
    least: int
    mpirun: str
    flags: list[str]

    def command(self, again: bool) -> list[str]:
        """The command line; after a failure, on the hosts that answer, and on no more ranks than they take.

        Raises:
            LaunchError: they take too few.
        """
        all_hosts, others = named_in(self.flags)
        left = those_that_answer(all_hosts, agent_of(self.flags)) if again else all_hosts
        if len(left) == len(all_hosts):
            return self._with(self.ranks, self.flags)
        ranks = ranks_on(left, all_hosts, self.ranks, ranks_of_a_model(self.words))
        silent = ", ".join(host.name for host in all_hosts if host not in left)
        if ranks < max(1, self.least):
            raise LaunchError(
                f"no answer from {silent}: {ranks} ranks could be started, {self.least} are wanted. Name "
                "other hosts, or lower --min-ranks"
            )
        LOG.warning(f"no answer from {silent}: starting {ranks} ranks")
        return self._with(ranks, ["--host", ",".join(map(str, left)), *others])

    def _with(self, ranks: int, flags: Sequence[str]) -> list[str]:
        return [self.mpirun, "-np", str(ranks), *flags, sys.executable, *self.words]


def ranks_of_a_model(words: Sequence[str]) -> int:
    """How many ranks share a model, from a job's flags and the file that ``--config`` names.

    Where these cannot be right the job itself says so: 1.
    """
    try:
        return ParallelismOptions(**options_among(words, ParallelismOptions)).ranks_of_a_model
    except UsageError:
        return 1
