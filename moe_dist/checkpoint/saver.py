"""Takes checkpoints of a run, while it goes on training.

Between two steps every rank copies its state to the CPU; a thread of its own then writes the copy, talking to the other
ranks over a process group of its own, so that training's collectives and its never meet. At most one checkpoint is
being written at a time: the next one waits for it.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from moe_dist.checkpoint.manifest import Manifest
from moe_dist.checkpoint.save_and_load import write_checkpoint
from moe_dist.checkpoint.sharded_tensor import Staging, State, is_away
from moe_dist.checkpoint.store import prune, remove_partial
from moe_dist.config import CheckpointConfig
from moe_dist.distributed.init import RankInfo
from moe_dist.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    """How an attempt to save ended, the same on all ranks but for the times."""

    path: Path
    step: int
    stall_seconds: float
    """How long training stood still."""
    seconds: float
    """From the copy to the commit."""
    error: str | None = None


class CheckpointSaver:
    """Writes the checkpoints of the run in the folder `run`; all ranks make one, and call it at the same points."""

    def __init__(self, run: Path, options: CheckpointConfig, process: RankInfo) -> None:
        self._run, self._options, self._rank = run, options, process.rank
        self._group = dist.new_group(backend="gloo", timeout=process.timeout)
        self._staging = Staging()
        self._writing: threading.Thread | None = None
        self._ended: Saved | None = None
        if process.rank == 0:
            remove_partial(run)

    def save(self, target: Path, manifest: Manifest, state: State) -> Saved | None:
        """Starts to save `state` as `target`, as it is now; returns how the save before it ended, if not yet told.

        With `checkpoint.asynchronous` this returns as soon as the state is copied, unless some of it is offloaded: that
        is written before training goes on, since a copy of it may fit nowhere. Collective, except for the writing.
        """
        asynchronous = self._options.asynchronous and not is_away(state)
        started = time.perf_counter()
        before = self.wait()
        copied = self._staging.copy(state)
        stall = time.perf_counter() - started

        def write() -> None:
            error = self._attempt(lambda: self._write(target, manifest, copied))
            seconds = time.perf_counter() - started
            stalled = stall if asynchronous else seconds
            self._ended = Saved(target, manifest.step, stalled, seconds, error)

        if asynchronous:
            self._writing = threading.Thread(target=write, name="checkpoint-writer", daemon=True)
            self._writing.start()
        else:
            write()
        return before

    def poll(self) -> Saved | None:
        """How the last save ended, once; None while it is being written or where that has been told."""
        return None if self._writing is not None and self._writing.is_alive() else self.wait()

    def wait(self) -> Saved | None:
        """The same, waiting for it."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        ended, self._ended = self._ended, None
        return ended

    def _write(self, target: Path, manifest: Manifest, state: State) -> None:
        write_checkpoint(target, manifest, state, self._rank, self._group)
        if self._rank == 0:
            prune(self._run, self._options)

    def _attempt(self, work: Callable[[], None]) -> str | None:
        """The error of `work` in one line: training is worth more than a checkpoint that cannot be written."""
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
