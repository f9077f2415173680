"""Kills a process at a chosen line of our code: the n-th one executed in some part of it."""

import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import moe_dist

PACKAGE = Path(moe_dist.__file__).parent
PARTS = {
    "step": (
        "engine/deepspeed_engine.py",
        "engine/gradient_norm.py",
        "model/",
        "moe/",
        "dispatch/",
        "training/trainer.py",
        "data/loader.py",
    ),
    "save": ("checkpoint/", "training/checkpointing.py"),
    "recluster": ("recluster/",),
}
"""What a run can be killed in; a kill in `save` hits copying, writing, committing and pruning alike."""


@dataclass(frozen=True)
class KillPoint:
    """Where `rank` dies: at line number `count` of those it executes in `part`; 0 counts them and kills nobody."""

    part: str
    rank: int
    count: int


class LineCounter:
    """Counts the lines executed in one part of the code, in all threads, and ends the process at a given one."""

    def __init__(self, part: str, last: int = 0) -> None:
        self.lines = 0
        self._last = last
        self._prefixes = tuple(str(PACKAGE / name) for name in PARTS[part])
        assert all(map(os.path.exists, self._prefixes)), f"a file of {self._prefixes} has moved"

    def __enter__(self) -> "LineCounter":
        threading.settrace(self._enter_function)
        sys.settrace(self._enter_function)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)

    def _enter_function(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._count if frame.f_code.co_filename.startswith(self._prefixes) else None

    def _count(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            self.lines += 1
            if self.lines == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
        return self._count
