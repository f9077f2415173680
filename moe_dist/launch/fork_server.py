"""Fork server: a process of a supervised job that imports torch and the trainer once and forks the ranks of a machine.

A launcher (local, DeepSpeed's, torchrun) starts the entry script of each rank as before. Before its heavy imports the
script sends its arguments, environment and standard streams through a Unix socket to the server, which forks the rank;
the script remains as a proxy that forwards signals and returns the rank's exit code. The job's supervisor starts the
server, before the launcher, and ends it. Ranks fork only where it is safe: no GPU is visible, and the server has no
thread beside its main one. Otherwise, or if the server has ended, the script runs the rank itself.
"""

import gc
import os
import platform
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

if __name__ == "__main__":  # started by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from moe_dist.launch.rank_proxy import FORWARDED, SOCKET, receive, send

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # read when torch is imported
STANDARD_INPUT = 0
PRELOADED = "moe_dist.training.trainer"
_CANNOT_FORK = {"pid": 0}


@dataclass(frozen=True)
class _ForkedRank:
    """Forked rank: its pid, its pidfd, and the connection to its proxy."""

    pid: int
    descriptor: int
    proxy: socket.socket


@contextmanager
def fork_server(folder: Path, environment: Mapping[str, str], preloaded: str = PRELOADED) -> Iterator[dict[str, str]]:
    """Start a server in a session of its own, yield the variables by which ranks find it, and end it at the exit.

    Args:
        folder: private folder of the job, for the socket.
        environment: environment of the job, with the variables that torch reads when it is imported.
        preloaded: module to import before ranks are forked.
    """
    path = folder / "fork-server"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))  # here, so that no rank can be too early
        listener.listen(128)
        server = subprocess.Popen(
            [sys.executable, "-u", __file__, str(listener.fileno()), preloaded],
            env=dict(environment),
            pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE,  # its end tells the server that the job or the supervisor has ended
            start_new_session=True,
        )
    try:
        yield {SOCKET: str(path)}
    finally:
        server.communicate()


class _ForkServer:
    """Loop of the server: accepts proxies, forks ranks, reports their ends."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._cores = sorted(os.sched_getaffinity(0))
        self._ranks: dict[int, _ForkedRank] = {}  # by pidfd
        self._poller = select.poll()
        for descriptor in (listener.fileno(), STANDARD_INPUT):
            self._poller.register(descriptor, select.POLLIN)

    def serve(self) -> dict[str, Any] | None:
        """Serve until standard input ends and return None; in a forked rank, return its request at once."""
        while True:
            for descriptor, _ in self._poller.poll():
                if descriptor == STANDARD_INPUT:
                    for rank in list(self._ranks.values()):
                        self._kill_abandoned(rank)
                    return None
                if descriptor == self._listener.fileno():
                    if (request := self._accept()) is not None:
                        return request
                elif descriptor in self._ranks:
                    self._report(self._ranks[descriptor])
                elif (abandoned := self._rank_of(descriptor)) is not None:
                    self._kill_abandoned(abandoned)

    def _accept(self) -> dict[str, Any] | None:
        """Fork a rank for a proxy; return its request in the rank, None in the server."""
        proxy, _ = self._listener.accept()
        try:
            _, streams, _, _ = socket.recv_fds(proxy, 1, 3)
            request = receive(proxy)
        except (OSError, EOFError):  # it has ended
            proxy.close()
            return None
        pid = os.fork() if self._suits(request) else None
        if pid == 0:
            self._leave(proxy)
            return {**request, "streams": streams}
        for descriptor in streams:
            os.close(descriptor)
        if pid is None:
            send(proxy, _CANNOT_FORK)
            proxy.close()
            return None
        rank = _ForkedRank(pid, os.pidfd_open(pid), proxy)
        self._ranks[rank.descriptor] = rank
        for descriptor in (rank.descriptor, proxy.fileno()):
            self._poller.register(descriptor, select.POLLIN)
        send(proxy, {"pid": pid})
        return None

    def _suits(self, request: Mapping[str, Any]) -> bool:
        """Return whether a fork is what the proxy would be: one thread, the same cores and threads of torch."""
        alone = len(os.listdir("/proc/self/task")) == 1
        wanted = request["environment"]
        same = all(wanted.get(name) == os.environ.get(name) for name in THREAD_VARIABLES)
        return alone and same and request["cores"] == self._cores

    def _leave(self, proxy: socket.socket) -> None:
        """Close what belongs to the server, in a forked rank, and start a process group."""
        os.setpgid(0, 0)  # signals to the group of the rank must not reach the server
        proxy.close()
        self._listener.close()
        for rank in self._ranks.values():
            os.close(rank.descriptor)
            rank.proxy.close()

    def _report(self, rank: _ForkedRank) -> None:
        """Tell the proxy how its rank ended; the zombie remains until the proxy is gone, for the supervisor to see."""
        status = os.waitid(os.P_PIDFD, rank.descriptor, os.WEXITED | os.WNOWAIT)
        assert status is not None
        killed = status.si_code != os.CLD_EXITED
        send(rank.proxy, {"status": status.si_status if killed else status.si_status << 8})
        self._poller.unregister(rank.descriptor)

    def _rank_of(self, connection: int) -> _ForkedRank | None:
        """Return the rank of a proxy; None: it was forgotten while events were handled."""
        return next((rank for rank in self._ranks.values() if rank.proxy.fileno() == connection), None)

    def _kill_abandoned(self, rank: _ForkedRank) -> None:
        """Kill a rank whose proxy has ended, unless it has ended itself, and wait for it."""
        self._poller.unregister(rank.proxy)
        with suppress(KeyError):
            self._poller.unregister(rank.descriptor)
        signal.pidfd_send_signal(rank.descriptor, signal.SIGKILL)
        os.waitpid(rank.pid, 0)
        os.close(rank.descriptor)
        rank.proxy.close()
        del self._ranks[rank.descriptor]


def _become(request: Mapping[str, Any]) -> None:
    """Take over arguments, environment, folder and standard streams of the proxy, in a forked rank."""
    for number, descriptor in enumerate(request["streams"]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["argv"]
    for signum in FORWARDED:
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


def main() -> NoReturn:
    """Import the trainer, then fork ranks until the job ends; a forked rank runs and exits with its code."""
    server = _ForkServer(socket.socket(fileno=int(sys.argv[1])))
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's, which starts threads at import; torch has MKL and OpenMP
    from moe_dist.errors import EXIT_FAILURE
    from moe_dist.launch import environment, rank
    from moe_dist.launch.processes import end_now

    environment.silence_library_warnings()
    try:
        import_module(sys.argv[2])
    except Exception:  # ranks import it themselves, and report the error
        os._exit(EXIT_FAILURE)
    gc.collect()
    gc.freeze()  # a collection in a rank does not write to the pages that all share
    request = server.serve()
    if request is None:
        os._exit(0)
    _become(request)
    end_now(rank.main())


if __name__ == "__main__":
    main()
