"""What a rank says of itself, so that whoever started it can name the rank that failed and why.

A supervised job (`moe-dist launch`) has a folder, named by an environment variable. Each rank leaves there
`rank-R.pid` when it starts, and `rank-R.done` or `rank-R.fault` when it ends. A rank that ends with neither was killed.
Ranks of a launcher that nobody supervises leave the same to each other (`peers.py`).
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
PEER_SECONDS = 3.0
PEER_LOST = re.compile(
    r"closed by (remote )?peer|reset by peer|broken pipe|socket closed|connection refused|remote process exited"
    r"|recvValue failed|DistNetworkError",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Fault:
    """Why a rank ended.

    Attributes:
        time: seconds since the epoch.
        line: the error in one line.
        consequence: it only met the end of another rank, so it is not the cause.
    """

    rank: int
    time: float
    line: str
    exit_code: int
    consequence: bool = False


def supervised_folder() -> Path | None:
    """The job's folder, or None where nobody supervises this rank."""
    name = os.environ.get(JOB_FOLDER)
    return Path(name) if name else None


def folder_of_ranks() -> Path | None:
    """Where ranks tell how they fare: the supervisor's folder, or one that the launcher's ranks here share."""
    return supervised_folder() or sibling_ranks.shared_folder()


def register(rank: int, *, leave_with_parent: bool) -> None:
    """Tells the supervisor that this process is `rank`, and sees to it that the rank never outlives its launcher."""
    watched = [os.getppid()] if leave_with_parent else []
    if supervised_folder() is not None:
        watched.append(int(os.environ[SUPERVISOR]))
    else:
        sibling_ranks.remove_abandoned()
    if (folder := folder_of_ranks()) is not None:
        _write(folder / f"rank-{rank}.pid", json.dumps({"pid": os.getpid(), "group": os.getpgid(0)}))
        for how in ("done", "fault"):  # of an earlier start by the same launcher: no news of this one
            (folder / f"rank-{rank}.{how}").unlink(missing_ok=True)
    threading.Thread(target=_leave_with, args=(watched,), name="leave-with-launcher", daemon=True).start()


def _leave_with(watched: list[int]) -> None:
    """Ends this process at once when any of the watched ones ends, even while it is blocked in a collective."""
    poller = select.poll()
    try:
        for pid in watched:
            poller.register(os.pidfd_open(pid), select.POLLIN)
        poller.poll()
    except ProcessLookupError:
        pass  # it ended before we looked
    except (AttributeError, OSError):
        return  # a kernel without pidfd: the launcher's own signals must do
    os._exit(128 + signal.SIGTERM)


def _told_folder(rank: int) -> Path | None:
    """The folder, if this rank is one of those that tell how they fare: a process that is alone has nobody to tell."""
    folder = folder_of_ranks()
    registered = folder is not None and (folder / f"rank-{rank}.pid").exists()
    return folder if registered or supervised_folder() is not None else None


def mark_done(rank: int, how: str = "") -> None:
    """Tells the supervisor that this rank ended as it should, or that it is STOPPED since it was asked to."""
    if (folder := _told_folder(rank)) is not None:
        _write(folder / f"rank-{rank}.done", how)


def read_done(folder: Path, rank: int) -> str | None:
    """What a rank said when it ended as it should, None: it did not."""
    try:
        return (folder / f"rank-{rank}.done").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def report(rank: int, world_size: int, error: BaseException) -> int:
    """Prints a rank's error, records it for the supervisor, and returns the rank's exit code.

    One clear line for an error meant for the user, the traceback before it for any other. A rank that merely lost a
    peer stays silent under a supervisor, which names the one that was first; without one it says just that.
    """
    expected = isinstance(error, MoeDistError)
    line = describe(error)
    lost = isinstance(error, ConnectionError) or PEER_LOST.search(line) is not None
    consequence = world_size > 1 and not expected and lost
    exit_code = error.exit_code if isinstance(error, MoeDistError) else EXIT_FAILURE
    fault = Fault(rank, time.time(), line, exit_code, consequence)
    if (folder := _told_folder(rank)) is not None:
        _write(folder / f"rank-{rank}.fault", json.dumps(asdict(fault)))
    if exit_code == EXIT_REFUSED:
        _tell_batch_script(line)
    if not expected and not consequence:
        traceback.print_exception(error)
    if supervised_folder() is None:
        print(f"moe-dist: {_complaint(fault, world_size, folder)}", file=sys.stderr, flush=True)
    return exit_code


def _tell_batch_script(line: str) -> None:
    """Writes into the file of slurm/train.sbatch that this job need not be tried again."""
    if file := os.environ.get(REFUSALS):
        with suppress(OSError), open(file, "a", encoding="utf-8") as refusals:
            refusals.write(f"{line}\n")


def _complaint(fault: Fault, world_size: int, folder: Path | None) -> str:
    if fault.consequence:
        cause = None if folder is None else _cause_among_peers(folder)
        return cause or f"rank {fault.rank} lost a peer: another rank ended first ({fault.line})"
    return f"rank {fault.rank} failed: {fault.line}" if world_size > 1 else f"error: {fault.line}"


def _cause_among_peers(folder: Path) -> str | None:
    """Which rank of this machine failed or was killed first; looks for a while, since that shows a little later."""
    deadline = time.monotonic() + PEER_SECONDS
    while time.monotonic() < deadline:
        told = [Fault(**json.loads(file.read_text(encoding="utf-8"))) for file in folder.glob("rank-*.fault")]
        first = root_cause(told)
        if first is not None and not first.consequence:
            return f"rank {first.rank} failed: {first.line}"
        if (killed := sibling_ranks.killed_rank(folder)) is not None:
            return f"rank {killed[0]} failed: its process (pid {killed[1]}) was killed or ended without a word"
        time.sleep(PEER_SECONDS / 30)
    return None


def describe(error: BaseException) -> str:
    """An error in one line: the message of one meant for the user, type and message of any other."""
    message = " ".join(str(error).split())
    kind = type(error).__name__
    line = message if isinstance(error, MoeDistError) else f"{kind}: {message}" if message else kind
    return line if len(line) <= LONGEST_LINE else line[: LONGEST_LINE - 4] + " ..."


def read_fault(folder: Path, rank: int) -> Fault | None:
    """What a rank recorded, or None where it recorded nothing."""
    try:
        return Fault(**json.loads((folder / f"rank-{rank}.fault").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def root_cause(faults: list[Fault]) -> Fault | None:
    """The fault that the others follow from: the first in time that is not itself a consequence."""
    return min(faults, key=lambda fault: (fault.consequence, fault.time), default=None)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
