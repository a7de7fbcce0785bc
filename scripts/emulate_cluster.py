"""A cluster on one machine: hosts of their own names and links of a given speed, and a command under mpirun.

    python scripts/emulate_cluster.py -- python scripts/train.py --steps 20
    python scripts/emulate_cluster.py --hosts 4 --rate 10gbit -- python scripts/train.py --steps 20
    python scripts/emulate_cluster.py --hosts 2 --slots 2 --rate 100mbit --np 3 -- python my_program.py
    python scripts/emulate_cluster.py --check            # can this machine do it?

Each host is a set of Linux namespaces: network, host name, /dev/shm and SysV memory are its own, files are
shared by all (as on a cluster with a network file system), and the hosts divide the cores. A host
has one link to a switch; it sends and receives at ``--rate`` each. Ranks of one host talk through memory.

Everything lives in namespaces without a name, in a process tree that ends with this script, so nothing
remains, even after ``kill -9``, and this machine's own network is never touched. SIGINT, SIGTERM and SIGUSR1
are passed on to mpirun. Needs root, iproute2, util-linux and Open MPI 5. Exit codes: that of mpirun, 64
usage, 69 something is missing, 78 not allowed here.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tf_dist.errors import BackendMissing, LaunchError, TfDistError, UsageError
from tf_dist.flags import Parser
from tf_dist.ops.supervisor import own_mpirun

INSIDE = "--inside"
# One process tree that ends with its first process, and a network and mounts that nobody else sees.
PRIVATE = (
    "unshare", "--fork", "--pid", "--kill-child", "--mount-proc", "--mount", "--net", "--uts", "--ipc",
)  # fmt: skip
TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
# Open MPI starts this many hosts from the first one; more would be started from each other.
MOST_HOSTS = 64
OWN = "/dev/shm"  # noqa: S108 - each host's own, in a namespace of its own
# How long mpirun may take to end its ranks; it kills those that are deaf to SIGTERM after a second.
GRACE_S = 5.0
SUBNET = "10.0.0"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What a host is: it takes its name, a /dev/shm and a /etc/hosts (in $1) of its own, says so, and stays.
HOST = """
echo "$0" > /proc/sys/kernel/hostname
mount -t tmpfs tmpfs /dev/shm && chmod 1777 /dev/shm
echo "$1" > /dev/shm/.hosts && mount --bind /dev/shm/.hosts /etc/hosts
ip link set lo up
echo ready && exec sleep infinity
"""


@dataclass(frozen=True)
class Host:
    """A host that runs: the process that holds its namespaces, and the cores that are its."""

    name: str
    pid: int
    cores: tuple[int, ...]

    def command(self, *words: str) -> list[str]:
        """A command line that runs another one on this host, in the folder we are in."""
        enter = ["nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--ipc", "--wd"]
        return [*enter, "taskset", "--cpu-list", ",".join(map(str, self.cores)), *words]

    def write(self, path: str, text: str) -> None:
        """Write a file that only this host sees."""
        Path(f"/proc/{self.pid}/root{path}").write_text(text)


def flags() -> Parser:
    """The flags; the command follows them after ``--``."""
    parser = Parser(__doc__ or "", "[options] -- COMMAND ...")
    parser.usage = "%(prog)s [options] -- COMMAND ..."
    parser.add_argument("--hosts", type=int, default=2, help="number of hosts (2)")
    parser.add_argument("--slots", type=int, default=1, help="ranks that fit on a host (1)")
    parser.add_argument(
        "--rate", default="1gbit", help="speed of a host's link: 1gbit, 100mbit, 56kbit (1gbit)"
    )
    parser.add_argument("--np", type=int, default=0, help="number of ranks, host by host (all slots)")
    parser.add_argument("--ulfm", action="store_true", help="fault tolerance: the job survives killed ranks")
    parser.add_argument("--check", action="store_true", help="only report whether this machine can do it")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command.

    Raises:
        UsageError: an option that cannot be right, or no command.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    options, command = flags().parse_args(argv[:cut]), argv[cut + 1 :]
    if not 1 <= options.hosts <= MOST_HOSTS:
        raise UsageError(
            f"--hosts {options.hosts} cannot be, because 1 to {MOST_HOSTS} can be had; do choose from these"
        )
    if options.slots < 1:
        raise UsageError(
            f"--slots {options.slots} cannot be, because a host holds at least one rank; do give 1 or more"
        )
    options.np = options.np or options.hosts * options.slots
    if not 1 <= options.np <= options.hosts * options.slots:
        raise UsageError(
            f"--np {options.np} cannot be, because {options.hosts} hosts of {options.slots} slots hold 1 to "
            f"{options.hosts * options.slots} ranks; do raise --slots or --hosts"
        )
    bits_per_second(options.rate)
    if options.check == bool(command):
        raise UsageError(
            "--check and a command exclude each other, because one is done; do give one: `-- COMMAND ...`"
        )
    return options, command


def bits_per_second(rate: str) -> float:
    """What a rate such as ``1gbit`` means.

    Raises:
        UsageError: it means nothing, or less than a bit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    bits = float(found[1]) * UNITS[found[2]] if found else 0.0
    if bits < 1:
        raise UsageError(
            f"--rate {rate} cannot be, because it is no speed; do write it as 1gbit, 2.5gbit or 100mbit"
        )
    return bits


def find_mpirun() -> str:
    """Open MPI's mpirun, the one beside this Python first.

    Raises:
        BackendMissing: none, or another one.
    """
    mpirun = shutil.which(own_mpirun())
    if mpirun is None:
        raise BackendMissing("no mpirun, because none is beside this Python or on PATH; do `make install`")
    said = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"\(Open MPI\) (\d+)", said)
    if not version or int(version[1]) < 5:
        raise BackendMissing(f"no use for {mpirun}, because it is not Open MPI 5; do `make install`")
    return mpirun


def check_possible() -> str:
    """The mpirun to use, where hosts can be emulated.

    Raises:
        BackendMissing: a tool is missing.
        LaunchError: this user, or this container, may not make namespaces.
    """
    if sys.platform != "linux":
        raise LaunchError("no hosts can be emulated, because this is not Linux; do it there")
    if os.geteuid() != 0:
        raise LaunchError(
            "no hosts can be emulated, because that needs root; do run it as root, or with sudo"
        )
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            raise BackendMissing(
                f"no hosts can be emulated, because `{tool}` is missing; do install {package}"
            )
    run(*PRIVATE, "true")
    return find_mpirun()


def run(*command: str) -> None:
    """Run a command that makes a piece of the cluster.

    Raises:
        LaunchError: it failed, for instance for lack of a capability or of a kernel module.
    """
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LaunchError(
            f"no hosts can be emulated, because `{shlex.join(command)}` failed ({said}); "
            "do run it as root, in a container with `docker run --privileged`"
        )


def shaper(rate: str) -> list[str]:
    """The words for ``tc`` that limit what a device sends."""
    # At least a millisecond's worth, or the limiter, which wakes up so often, does not reach its rate.
    burst = max(128 * 1024, int(bits_per_second(rate) / 8 / 1000))
    return ["root", "tbf", "rate", rate, "burst", str(burst), "latency", "50ms"]


def cores_of(host: int, hosts: int) -> tuple[int, ...]:
    """A host's share of the cores that we may use; with more hosts than cores, some share one."""
    cores = sorted(os.sched_getaffinity(0))
    if hosts > len(cores):
        return (cores[host % len(cores)],)
    return tuple(cores[host * len(cores) // hosts : (host + 1) * len(cores) // hosts])


def build(hosts: int, rate: str) -> list[Host]:
    """A switch, in the namespace that we are in, and hosts around it.

    Raises:
        LaunchError: the kernel refuses.
    """
    run("ip", "link", "add", "switch", "type", "bridge")
    run("ip", "link", "set", "switch", "up")
    names = [f"node{number}" for number in range(hosts)]
    known = ["127.0.0.1 localhost", *(f"{address(number)} {name}" for number, name in enumerate(names))]
    return [add_host(number, hosts, "\n".join(known), rate) for number in range(hosts)]


def address(number: int) -> str:
    """A host's address; .0 is the network."""
    return f"{SUBNET}.{number + 1}"


def add_host(number: int, hosts: int, known: str, rate: str) -> Host:
    """Start a host and plug it in."""
    name, port = f"node{number}", f"port{number}"
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "--ipc", "sh", "-ec", HOST, name, known],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if not holder.stdout or not holder.stderr or holder.stdout.readline() != "ready\n":
        said = " ".join(holder.communicate()[1].split())
        raise LaunchError(
            f"no hosts can be emulated, because {name} does not start ({said}); do run it as root"
        )
    host = Host(name, holder.pid, cores_of(number, hosts))
    run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
    run("ip", "link", "set", port, "master", "switch", "up")
    run("tc", "qdisc", "add", "dev", port, *shaper(rate))
    run(*host.command("ip", "address", "add", f"{address(number)}/24", "dev", "eth0"))
    run(*host.command("ip", "link", "set", "eth0", "up"))
    run(*host.command("tc", "qdisc", "add", "dev", "eth0", *shaper(rate)))
    return host


def agent(hosts: Sequence[Host]) -> str:
    """What Open MPI runs in the place of ssh: a host's name, and what to run there."""
    arms = [f'{host.name}) shift; exec {shlex.join(host.command("sh", "-c"))} "$*";;' for host in hosts]
    return "\n".join(['case "$1" in', *arms, "esac", 'echo "$1: no such host" >&2; exit 1', ""])


def launch_line(mpirun: str, options: argparse.Namespace, hosts: Sequence[Host]) -> list[str]:
    """The mpirun that finds the hosts. What it leaves behind, it leaves in a host's own /dev/shm."""
    subnet = f"{SUBNET}.0/24"
    return [
        *(
            mpirun,
            *(("--with-ft", "ulfm") if options.ulfm else ()),
            "-np",
            str(options.np),
            "--host",
            ",".join(f"{host.name}:{options.slots}" for host in hosts),
        ),
        *("--prtemca", "plm_ssh_agent", f"sh {OWN}/.agent", "--prtemca", "prte_if_include", subnet),
        *("--prtemca", "prte_tmpdir_base", OWN, "--bind-to", "none"),
        *("--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp", "--mca", "btl_tcp_if_include", subnet),
        # Open MPI sees enough slots. Ranks that wait for others must leave them the cores all the same.
        *("--mca", "mpi_yield_when_idle", str(int(options.np > len(os.sched_getaffinity(0))))),
    ]


def inside(options: argparse.Namespace, command: Sequence[str], mpirun: str) -> int:
    """The first process of the tree: build the hosts and run the command over them."""
    pass_on_signals(lambda number: os._exit(128 + number))
    hosts = build(options.hosts, options.rate)
    if options.check:
        return 0
    hosts[0].write(f"{OWN}/.agent", agent(hosts))
    line = [*launch_line(mpirun, options, hosts), *command]
    print(describe(options, hosts), file=sys.stderr, flush=True)
    job = subprocess.Popen(hosts[0].command(*line), stdin=subprocess.DEVNULL)
    pass_on_signals(lambda number: signal_job(job, number))
    return exit_code(job.wait())


def signal_job(job: subprocess.Popen[bytes], number: int) -> None:
    """Pass a signal on to mpirun, and end without it where it does not end on one that says so."""
    job.send_signal(number)
    if number != signal.SIGUSR1:
        # Open MPI 5.0 hangs when the signal comes while it starts its daemons.
        timer = threading.Timer(GRACE_S, os._exit, [128 + number])
        timer.daemon = True
        timer.start()


def describe(options: argparse.Namespace, hosts: Sequence[Host]) -> str:
    """What was built, in a line."""
    cores = ", ".join(f"{host.name} (core {','.join(map(str, host.cores))})" for host in hosts)
    return (
        f"emulated: {cores}; {options.rate} to and from each; {options.np} ranks in slots of {options.slots}"
    )


def exit_code(status: int) -> int:
    """The exit code of a process, as a shell gives it."""
    return 128 - status if status < 0 else status


def end_with(pipe: Any) -> None:
    """End with the process that holds the other end of a pipe, however that ends."""
    pipe.read()
    os._exit(128 + signal.SIGKILL)


def outside(argv: Sequence[str], mpirun: str) -> int:
    """Run this script again, as the first process of a tree of its own, and pass signals on to it."""
    # A blocked signal waits, here and in what we start, until there is somebody to take it.
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    # Open MPI refuses root, which we need; the shell of an activated .venv allows it in the same way.
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    # In a process group of its own, so that Ctrl-C comes once, from us. The pipe closes when we end.
    tree = subprocess.Popen(
        [*PRIVATE, sys.executable, __file__, INSIDE, mpirun, *argv],
        env=os.environ | allowed,
        stdin=subprocess.PIPE,
        process_group=0,
    )
    pass_on_signals(lambda number: signal_first(tree, number))
    return exit_code(tree.wait())


def pass_on_signals(send: Callable[[int], None]) -> None:
    """From now on, give signals to ``send``."""
    for number in FORWARDED:
        signal.signal(number, lambda number, _: send(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def signal_first(tree: subprocess.Popen[bytes], number: int) -> None:
    """Signal the first process of the tree: the child of ``unshare``, which itself takes no signals."""
    children = Path(f"/proc/{tree.pid}/task/{tree.pid}/children")
    while tree.poll() is None:
        if first := children.read_text().split():
            os.kill(int(first[0]), number)
            return
        time.sleep(0.01)


def main(argv: list[str]) -> int:
    """Build, run, and give the exit code of the command."""
    try:
        if argv[:1] == [INSIDE]:
            threading.Thread(target=end_with, args=[sys.stdin], daemon=True).start()
            return inside(*parse(argv[2:]), argv[1])
        parse(argv)
        return outside(argv, check_possible())
    except TfDistError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
