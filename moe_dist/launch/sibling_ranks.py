"""What ranks of one launcher on one machine leave for each other where no supervisor watches them.

Under plain `deepspeed` or `torchrun` a rank that is killed says nothing, and its peers only see a connection close. So
each keeps its process number in a folder that the children of one launcher process share; who loses a peer looks there
for one that is gone without a word, or for the fault that was first.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

from moe_dist.launch.processes import has_ended, start_of

PREFIX = "moe-dist-ranks"


def shared_folder() -> Path | None:
    """The folder of this launcher's ranks, private to the user; None where it cannot be had."""
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
    """Removes what ranks of launchers that have ended left behind."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_prefix()}*"):
        parent, _, started = folder.name.removeprefix(_prefix()).partition("-")
        if parent.isdecimal() and start_of(int(parent)) != started:
            shutil.rmtree(folder, ignore_errors=True)


def killed_rank(folder: Path) -> tuple[int, int] | None:
    """(rank, process number) of a rank that has ended without a word, or None."""
    for file in sorted(folder.glob("rank-*.pid")):
        rank = int(file.stem.removeprefix("rank-"))
        spoke = any((folder / f"rank-{rank}.{how}").exists() for how in ("done", "fault"))
        pid = int(json.loads(file.read_text(encoding="utf-8"))["pid"])
        if not spoke and has_ended(pid):
            return rank, pid
    return None


def _prefix() -> str:
    """Of the folders' names: of this user, where process numbers mean the same.

    Containers, and jobs with process numbers of their own, may share a folder for temporary files.
    """
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{PREFIX}-{os.getuid()}-{space}-"
