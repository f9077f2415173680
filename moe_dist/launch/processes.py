"""Start time and exit status of processes that are no children of this one (Linux), and a fast end of this one."""

import atexit
import fcntl
import os
import signal
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# `struct pidfd_info` of linux/pidfd.h, first published version: a mask of what is asked and told, last the wait status.
_GET_INFO = 0xC040FF0B  # PIDFD_GET_INFO, _IOWR(0xFF, 11, 64 bytes)
_INFO_EXIT = 1 << 3
_INFO_BYTES = 64
_MASK, _STATUS = struct.Struct("=Q"), struct.Struct("=i")
_ENDED = ("Z", "X")  # states of a zombie


def wait_status(descriptor: int, pid: int) -> int | None:
    """Return the status that `os.wait` gives the parent of an ended process, to any process that holds its pidfd.

    Args:
        descriptor: the process's pidfd, opened before its parent waited for it.
        pid: its process id, for kernels older than 6.15; these answer only until the parent has waited.

    Returns:
        A status for `os.WIFSIGNALED` and its like; None: it is not available, or the process has not ended.
    """
    info = bytearray(_INFO_BYTES)
    _MASK.pack_into(info, 0, _INFO_EXIT)
    with suppress(OSError):
        fcntl.ioctl(descriptor, _GET_INFO, info)
        if _MASK.unpack_from(info)[0] & _INFO_EXIT:
            return int(_STATUS.unpack_from(info, _INFO_BYTES - _STATUS.size)[0])
    return _status_of_zombie(pid)


def was_terminated(status: int | None) -> bool:
    """Return whether a process is known to have ended by SIGTERM."""
    return status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def start_of(pid: int) -> str | None:
    """Return the start time of a process in clock ticks since boot; with the pid, it identifies a process uniquely."""
    fields = _stat(pid)
    return fields[19] if fields else None


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or a zombie that its parent has not yet waited for."""
    fields = _stat(pid)
    return fields is None or fields[0] in _ENDED


def group_runs(group: int) -> bool:
    """Return whether a process of a process group runs; zombies, whose new parent may wait for them late, do not."""
    processes = (_stat(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return any(fields is not None and int(fields[2]) == group and fields[0] not in _ENDED for fields in processes)


def end_now(code: int) -> NoReturn:
    """End this process after its threads and exit functions, without the second that Python takes to free all objects.

    The kernel frees them at once.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full file, or closed
            stream.flush()
    os._exit(code)


def _status_of_zombie(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[-1]) if fields and fields[0] in _ENDED else None


def _stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/<pid>/stat from the state on; None without such a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split() or None
