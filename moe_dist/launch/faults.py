"""Status files of ranks, from which a supervisor names the rank that failed and its error.

A supervised job (`moe-dist launch`) has a folder, named by an environment variable. Each rank writes `rank-R.pid` when
it starts, and `rank-R.done` or `rank-R.fault` when it ends; a rank that ends with neither was killed. Ranks without a
supervisor share a folder of their own (`sibling_ranks.py`).
"""

import json
import os
import re
import select
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_dist.errors import EXIT_FAILURE, EXIT_REFUSED, MoeDistError
from moe_dist.launch import sibling_ranks

JOB_FOLDER = "MOE_DIST_JOB_FOLDER"
SUPERVISOR = "MOE_DIST_SUPERVISOR_PID"
REFUSALS = "MOE_DIST_REFUSALS"
EXIT_INTERRUPTED = 130
LONGEST_LINE = 500
STOPPED = "stopped"
STATUS_SECONDS = 3.0
CONNECTION_LOST = re.compile(
    r"closed by (remote )?peer|reset by peer|broken pipe|socket closed|connection refused|remote process exited"
    r"|recvValue failed|DistNetworkError",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Fault:
    """Failure of one rank.

    Attributes:
        time: seconds since the epoch.
        line: the error in one line.
        consequence: the failure only followed from the end of another rank.
    """

    rank: int
    time: float
    line: str
    exit_code: int
    consequence: bool = False


def supervised_folder() -> Path | None:
    """Return the folder of a supervised job; None without a supervisor."""
    name = os.environ.get(JOB_FOLDER)
    return Path(name) if name else None


def status_folder() -> Path | None:
    """Return the folder of status files: the supervisor's, or the one shared by the ranks of one launcher here."""
    return supervised_folder() or sibling_ranks.shared_folder()


def register(rank: int, *, end_with_parent: bool) -> None:
    """Write this rank's pid file, and start a thread that ends the rank when its launcher or supervisor ends."""
    watched = [os.getppid()] if end_with_parent else []
    if supervised_folder() is not None:
        watched.append(int(os.environ[SUPERVISOR]))
    else:
        sibling_ranks.remove_abandoned()
    if (folder := status_folder()) is not None:
        _write(folder / f"rank-{rank}.pid", json.dumps({"pid": os.getpid(), "group": os.getpgid(0)}))
        for how in ("done", "fault"):  # left by an earlier start under the same launcher
            (folder / f"rank-{rank}.{how}").unlink(missing_ok=True)
    threading.Thread(target=_end_with, args=(watched,), name="end-with-launcher", daemon=True).start()


def _end_with(watched: list[int]) -> None:
    """End this process as soon as one of the watched ones ends, even while it is blocked in a collective."""
    poller = select.poll()
    try:
        for pid in watched:
            poller.register(os.pidfd_open(pid), select.POLLIN)
        poller.poll()
    except ProcessLookupError:
        pass  # it has ended already
    except (AttributeError, OSError):
        return  # a kernel without pidfd: only the launcher's own signals end the rank
    os._exit(128 + signal.SIGTERM)


def _registered_folder(rank: int) -> Path | None:
    """Return the folder if this rank has registered in it; a process that is the whole job has not."""
    folder = status_folder()
    registered = folder is not None and (folder / f"rank-{rank}.pid").exists()
    return folder if registered or supervised_folder() is not None else None


def mark_done(rank: int, how: str = "") -> None:
    """Record that this rank ended as it should, or that it is STOPPED by a signal."""
    if (folder := _registered_folder(rank)) is not None:
        _write(folder / f"rank-{rank}.done", how)


def read_done(folder: Path, rank: int) -> str | None:
    """Return the record of a rank that ended as it should; None otherwise."""
    try:
        return (folder / f"rank-{rank}.done").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def report(rank: int, world_size: int, error: BaseException) -> int:
    """Print a rank's error, record it for the supervisor, and return the rank's exit code.

    An error meant for the user is one line; any other has its traceback before that line. Under a supervisor a rank
    that only lost its connection prints nothing; without one it prints the first failure that it can find.
    """
    expected = isinstance(error, MoeDistError)
    line = describe(error)
    lost = isinstance(error, ConnectionError) or CONNECTION_LOST.search(line) is not None
    consequence = world_size > 1 and not expected and lost
    exit_code = error.exit_code if isinstance(error, MoeDistError) else EXIT_FAILURE
    fault = Fault(rank, time.time(), line, exit_code, consequence)
    if (folder := _registered_folder(rank)) is not None:
        _write(folder / f"rank-{rank}.fault", json.dumps(asdict(fault)))
    if exit_code == EXIT_REFUSED:
        _record_refusal(line)
    if not expected and not consequence:
        traceback.print_exception(error)
    if supervised_folder() is None:
        with suppress(OSError):  # standard error may be a full file
            print(f"moe-dist: {_message(fault, world_size, folder)}", file=sys.stderr, flush=True)
    return exit_code


def _record_refusal(line: str) -> None:
    """Record for slurm/train.sbatch that this job must not be requeued."""
    if file := os.environ.get(REFUSALS):
        with suppress(OSError), open(file, "a", encoding="utf-8") as refusals:
            refusals.write(f"{line}\n")


def _message(fault: Fault, world_size: int, folder: Path | None) -> str:
    if fault.consequence:
        cause = None if folder is None else _first_failure(folder)
        return cause or f"rank {fault.rank} lost its connection: another rank ended first ({fault.line})"
    return f"rank {fault.rank} failed: {fault.line}" if world_size > 1 else f"error: {fault.line}"


def _first_failure(folder: Path) -> str | None:
    """Return the first failed or killed rank of this machine; poll for some seconds, since status files come late."""
    deadline = time.monotonic() + STATUS_SECONDS
    while time.monotonic() < deadline:
        faults_here = [Fault(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("rank-*.fault")]
        first = root_cause(faults_here)
        if first is not None and not first.consequence:
            return f"rank {first.rank} failed: {first.line}"
        if (killed := sibling_ranks.killed_rank(folder)) is not None:
            return f"rank {killed[0]} failed: its process (pid {killed[1]}) was killed or ended without a status"
        time.sleep(STATUS_SECONDS / 30)
    return None


def describe(error: BaseException) -> str:
    """Return an error in one line: the message of an error meant for the user, type and message of any other."""
    message = " ".join(str(error).split())
    kind = type(error).__name__
    line = message if isinstance(error, MoeDistError) else f"{kind}: {message}" if message else kind
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 4] + " ..."


def read_fault(folder: Path, rank: int) -> Fault | None:
    """Return the recorded fault of a rank; None without one."""
    try:
        return Fault(**json.loads((folder / f"rank-{rank}.fault").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def root_cause(faults: list[Fault]) -> Fault | None:
    """Return the fault that the others follow from: the first in time that is no consequence itself."""
    return min(faults, key=lambda fault: (fault.consequence, fault.time), default=None)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
