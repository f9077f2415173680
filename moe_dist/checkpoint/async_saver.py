"""Asynchronous checkpoints of a run.

Between two steps every rank copies its state to the CPU. A thread then writes the copy and communicates over a process
group of its own, so that its collectives never interleave with those of training. At most one checkpoint is written at
a time; the next one waits for it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from moe_dist.checkpoint.manifest import Manifest
from moe_dist.checkpoint.save_and_load import write_checkpoint
from moe_dist.checkpoint.sharded_tensor import Staging, State, is_offloaded
from moe_dist.checkpoint.store import CHECKPOINTS, prune, remove_partial
from moe_dist.config import CheckpointConfig
from moe_dist.distributed.init import RankInfo
from moe_dist.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    """Result of an attempt to save, the same on all ranks except for the times."""

    path: Path
    step: int
    stall_seconds: float
    """Time that training was blocked, seconds."""
    seconds: float
    """Time from the copy to the commit, seconds."""
    error: str | None = None
    warning: str | None = None
    """Problem that leaves the checkpoint valid."""


class CheckpointSaver:
    """Writer of a run's checkpoints in the folder `run`; all ranks create one and call it at the same steps."""

    def __init__(self, run: Path, options: CheckpointConfig, process: RankInfo) -> None:
        self._run, self._options, self._rank = run, options, process.rank
        self._group = dist.new_group(backend="gloo", timeout=process.timeout)
        self._staging = Staging()
        self._writing: threading.Thread | None = None
        self._ended: Saved | None = None
        if process.rank == 0:
            remove_partial(run)

    def save(self, target: Path, manifest: Manifest, state: State) -> Saved | None:
        """Start to save `state` as `target`; return the result of the save before it, unless already returned.

        With `checkpoint.asynchronous` this returns when the state is copied. Offloaded state is written before this
        returns, since memory may not hold a copy of it. Collective, except for the writing.
        """
        asynchronous = self._options.asynchronous and not is_offloaded(state)
        started = time.perf_counter()
        before = self.wait()
        copied = self._staging.copy(state)
        stall = time.perf_counter() - started

        def write() -> None:
            error = self._attempt(lambda: write_checkpoint(target, manifest, copied, self._rank, self._group))
            warning = self._prune() if error is None else None
            seconds = time.perf_counter() - started
            stalled = stall if asynchronous else seconds
            self._ended = Saved(target, manifest.step, stalled, seconds, error, warning)

        if asynchronous:
            self._writing = threading.Thread(target=write, name="checkpoint-writer", daemon=True)
            self._writing.start()
        else:
            write()
        return before

    def poll(self) -> Saved | None:
        """Return the last save's result, once; None while it is being written or after it was returned."""
        return None if self._writing is not None and self._writing.is_alive() else self.wait()

    def wait(self) -> Saved | None:
        """Wait for the save in progress and return its result, once."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        ended, self._ended = self._ended, None
        return ended

    def _prune(self) -> str | None:
        """Delete old checkpoints on rank 0; return the reason in one line if that fails."""
        try:
            if self._rank == 0:
                prune(self._run, self._options)
        except OSError as error:
            return f"{self._run / CHECKPOINTS}: old checkpoints cannot be deleted: {error.strerror}"
        return None

    def _attempt(self, work: Callable[[], None]) -> str | None:
        """Return the error of `work` in one line, or None: a failed checkpoint does not stop training."""
        try:
            work()
        except (CheckpointError, OSError) as error:
            return str(error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            if self._rank == 0:
                remove_partial(self._run)
        return None
