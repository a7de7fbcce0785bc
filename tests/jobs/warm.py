"""Ranks forked from a process that has TensorFlow loaded: that costs 4 s of a core in each new interpreter.

    warm.py serve SOCKET           load, then fork a rank for each request
    warm.py SOCKET SCRIPT ...      what mpirun starts in place of ``python SCRIPT ...``

The second asks the first for a child with its own arguments, folder, environment, cores and open streams,
passes signals on, and ends as the child does; if it is killed, so is the child. Tests of processes (of who
is killed, limits, /proc, what a rank's environment does to TensorFlow) start their ranks cold.
"""

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import types
from functools import partial
from pathlib import Path

# What training, evaluation and generation load, of others.
LOADED = """
    keras matplotlib.pyplot mpi4py msgspec numpy pandas psutil rich.progress safetensors.numpy tensorflow
    threadpoolctl tokenizers yaml
""".split()
PASSED_ON = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2
STREAMS = 0, 1, 2
LARGEST_REQUEST = 1 << 20


class Server:
    """Forks a rank for each request, until nobody holds the other end of its standard input.

    Args:
        path: of its socket.
    """

    def __init__(self, path):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        self._woken, self._wakes = socket.socketpair()
        for end in (self._woken, self._wakes):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes.fileno())
        self._asked = {}  # by pid of the child: the connection of who has asked for it
        self._select = selectors.DefaultSelector()
        for source in (sys.stdin, self._listener, self._woken):
            self._select.register(source, selectors.EVENT_READ)

    def serve(self):
        """Returns only in a child: what it is to run."""
        while True:
            for key, _ in self._select.select():
                if key.fileobj is sys.stdin:
                    sys.exit()
                elif key.fileobj is self._woken:
                    self._woken.recv(1024)
                    self._report()
                elif key.fileobj is not self._listener:
                    self._kill_child_of(key.fileobj)
                elif arguments := self._fork():
                    return arguments

    def _fork(self):
        connection, _ = self._listener.accept()
        request, streams, *_ = socket.recv_fds(connection, LARGEST_REQUEST, len(STREAMS))
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            ours = (self._listener, self._woken, self._wakes, self._select, *self._asked.values())
            for one in (connection, *ours):
                one.close()
            return _become(json.loads(request), streams)
        for stream in streams:
            os.close(stream)
        self._asked[pid] = connection
        self._select.register(connection, selectors.EVENT_READ)
        connection.sendall(f"{pid}\n".encode())
        return None

    def _kill_child_of(self, connection):
        """Who has asked was killed."""
        self._select.unregister(connection)
        for pid in (pid for pid, asked in self._asked.items() if asked is connection):
            os.killpg(pid, signal.SIGKILL)

    def _report(self):
        """Tell those whose child has ended how."""
        while self._asked:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            connection = self._asked.pop(pid)
            try:
                self._select.unregister(connection)
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            except (KeyError, OSError):  # was killed
                pass
            connection.close()


def load():
    """Load what ranks need, once."""
    for name in LOADED:
        importlib.import_module(name)
    gc.freeze()


def _become(request, streams):
    """Be the process that was asked for; what it is to run."""
    os.setsid()
    for stream, wanted in zip(streams, STREAMS, strict=True):
        os.dup2(stream, wanted)
        os.close(stream)
    for number in (*PASSED_ON, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.sched_setaffinity(0, request["cores"])
    sys.modules["numpy"].random.seed()  # those of Python have new seeds after a fork
    return request["arguments"]


def run(arguments):
    """What ``python SCRIPT ...`` does."""
    sys.argv = arguments
    path = arguments[0]
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    sys.path[1:1] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__, main.__builtins__ = path, __builtins__
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    exec(code, main.__dict__)


def ask(path, arguments):
    """Have a child run ``python *arguments`` in our place; ends as it does."""
    umask = os.umask(0)
    os.umask(umask)
    request = {
        "arguments": arguments,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "umask": umask,
        "cores": list(os.sched_getaffinity(0)),
    }
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    socket.send_fds(connection, [json.dumps(request).encode()], STREAMS)
    answers = connection.makefile()
    child = int(answers.readline())
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    for stream in STREAMS:
        os.close(stream)
    code = int(answers.readline() or 1)
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        sys.path.append(str(Path(__file__).parents[1]))
        from leaving import leave, status_of

        sys.path.pop()
        load()
        server = Server(sys.argv[2])
        print("ready", flush=True)
        leave(status_of(partial(run, server.serve())))
    else:
        ask(sys.argv[1], sys.argv[2:])
