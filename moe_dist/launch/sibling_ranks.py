"""Status files that ranks started by one launcher on one machine share when no supervisor watches them.

Under plain `deepspeed` or `torchrun` nobody reports a rank that is killed; the others only see a closed connection. So
each rank writes its pid into a folder that is shared by the children of one launcher process. A rank that loses a
connection looks there for a rank that ended without a status, or for the first fault.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from moe_dist.launch.processes import has_ended, start_of

PREFIX = "moe-dist-ranks"


def shared_folder() -> Path | None:
    """Return the folder of this launcher's ranks, private to the user; None if it cannot be created."""
    parent = os.getppid()
    started = start_of(parent)
    if started is None:
        return None
    folder = Path(tempfile.gettempdir()) / f"{_prefix()}{parent}-{started}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return None
    return folder if state.st_uid == os.getuid() and not folder.is_symlink() else None


def remove_abandoned() -> None:
    """Remove the folders of launchers that have ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
        parent, _, started = folder.name.removeprefix(_prefix()).partition("-")
        if parent.isdecimal() and start_of(int(parent)) != started:
            shutil.rmtree(folder, ignore_errors=True)


def killed_rank(folder: Path) -> tuple[int, int] | None:
    """Return (rank, pid) of a rank that has ended without a status file; None without one."""
    for file in sorted(folder.glob("rank-*.pid")):
        rank = int(file.stem.removeprefix("rank-"))
        spoke = any((folder / f"rank-{rank}.{how}").exists() for how in ("done", "fault"))
        pid = int(json.loads(file.read_text(encoding="utf-8"))["pid"])
        if not spoke and has_ended(pid):
            return rank, pid
    return None


def _prefix() -> str:
    """Return the prefix of folder names: this user's, in this PID namespace.

    Containers with PID namespaces of their own may share a folder for temporary files.
    """
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{PREFIX}-{os.getuid()}-{space}-"
