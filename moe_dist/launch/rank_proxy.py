"""Proxy of a rank that runs in a process forked by the job's fork server (`fork_server.py`), and their messages.

The entry script of a rank calls `run_forked` before its heavy imports. It imports the standard library alone.

A proxy sends its arguments, environment, folder, cores and standard streams, and receives `{"pid": ...}`, then
`{"status": ...}` as of `os.wait`. Each message is a line of JSON.
"""

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

SOCKET = "MOE_DIST_FORK_SERVER"  # variable that names the server's socket
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_forked() -> None:
    """Run this rank in a forked process and exit with its code; return if it must run in this process."""
    path = os.environ.pop(SOCKET, None)  # not for processes that the rank itself starts
    if path is None:
        return
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server, _forward_signals() as rank:
        rank.pid = _request_fork(server, path)
        if rank.pid:
            _wait_and_exit(server, parent)


def _request_fork(server: socket.socket, path: str) -> int:
    """Return the pid of the forked rank; 0: the server cannot fork it, or has ended."""
    request = {
        "argv": sys.argv,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    try:
        server.connect(path)
        socket.send_fds(server, [b"\n"], [0, 1, 2])
        server.sendall(json.dumps(request).encode() + b"\n")
        return int(receive(server)["pid"])
    except (OSError, EOFError):
        return 0


class _Forwarded:
    """Process that receives the signals of this one; `pid` 0: not known yet, they are kept."""

    def __init__(self) -> None:
        self._pid, self._kept = 0, list[int]()

    @property
    def pid(self) -> int:
        return self._pid

    @pid.setter
    def pid(self, pid: int) -> None:
        self._pid = pid
        for signum in self._kept if pid else []:
            self.send(signum)

    def send(self, signum: int, frame: FrameType | None = None) -> None:
        if not self._pid:
            self._kept.append(signum)
            return
        with suppress(ProcessLookupError):
            os.kill(self._pid, signum)


@contextmanager
def _forward_signals() -> Iterator[_Forwarded]:
    rank = _Forwarded()
    before = {signum: signal.signal(signum, rank.send) for signum in FORWARDED}
    try:
        yield rank
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait_and_exit(server: socket.socket, parent: int) -> NoReturn:
    """Exit as the rank does; at once when the launcher that started this process has ended."""
    poller = select.poll()
    poller.register(server, select.POLLIN)
    with suppress(ProcessLookupError):
        poller.register(os.pidfd_open(parent), select.POLLIN)
    launcher_ended = server.fileno() not in dict(poller.poll())
    try:
        status = signal.SIGTERM if launcher_ended else int(receive(server)["status"])
    except (OSError, EOFError):  # the server was killed, and its ranks with it
        status = signal.SIGKILL
    if os.WIFSIGNALED(status):
        with suppress(OSError):  # no process can change what SIGKILL does
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status))


def receive(connection: socket.socket) -> dict[str, Any]:
    """Return one line of JSON.

    Raises:
        EOFError: the other side has closed the connection.
    """
    with connection.makefile("rb", buffering=0) as stream:  # unbuffered: reads nothing beyond the line
        line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    found: dict[str, Any] = json.loads(line)
    return found


def send(connection: socket.socket, message: Mapping[str, object]) -> None:
    """Send one line of JSON, unless the other side has ended."""
    with suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")
