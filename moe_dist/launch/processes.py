"""What Linux tells of processes that somebody else started: when they started, whether and how they have ended."""

import fcntl
import os
import signal
import struct
from contextlib import suppress
from pathlib import Path

# `struct pidfd_info` of linux/pidfd.h, first published version: a mask of what is asked and told, last the wait status.
_GET_INFO = 0xC040FF0B  # PIDFD_GET_INFO, _IOWR(0xFF, 11, 64 bytes)
_INFO_EXIT = 1 << 3
_INFO_BYTES = 64
_MASK, _STATUS = struct.Struct("=Q"), struct.Struct("=i")
_ENDED = ("Z", "X")  # states of a zombie


def wait_status(descriptor: int, pid: int) -> int | None:
    """The status that `os.wait` gives the parent of an ended process, for anyone who watched it by a pidfd.

    Args:
        descriptor: the process's pidfd, opened before it was waited for.
        pid: its process id; asked where the kernel is older than 6.15 and answers as long as the parent has not waited.

    Returns:
        A status for `os.WIFSIGNALED` and its like; None: it is past finding out, or the process has not ended.
    """
    info = bytearray(_INFO_BYTES)
    _MASK.pack_into(info, 0, _INFO_EXIT)
    with suppress(OSError):
        fcntl.ioctl(descriptor, _GET_INFO, info)
        if _MASK.unpack_from(info)[0] & _INFO_EXIT:
            return int(_STATUS.unpack_from(info, _INFO_BYTES - _STATUS.size)[0])
    return _status_of_zombie(pid)


def was_terminated(status: int | None) -> bool:
    """Whether a process is known to have ended by SIGTERM."""
    return status is not None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


def start_of(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: with its number, a name that is never used again."""
    fields = _stat(pid)
    return fields[19] if fields else None


def has_ended(pid: int) -> bool:
    """Gone, or a zombie that its parent has not yet waited for."""
    fields = _stat(pid)
    return fields is None or fields[0] in _ENDED


def _status_of_zombie(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[-1]) if fields and fields[0] in _ENDED else None


def _stat(pid: int) -> list[str] | None:
    """/proc/<pid>/stat from the state on, which follows the name in parentheses; None where no such process is."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split() or None
