"""Folder of one run, `runs/<name>/`: a contract for people and tools (docs/metrics.md).

    config.yaml     the resolved configuration
    metrics.jsonl   one JSON object per logged step
    load.jsonl      one JSON object per logged step: copies routed to each expert, cluster and rank
    traffic.json    bytes and messages from rank to rank over the whole run
    events.jsonl    one JSON object per event: evaluations, re-clusterings, checkpoints, faults, end of the run
    tensorboard/    the metrics again, for TensorBoard
    summary.json    the figures of the finished run
    .lock           held while a job writes the folder

Lines are written whole and flushed, so that the folder of a run that is interrupted or killed is readable.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from moe_dist.errors import ConfigError
from moe_dist.metrics.json_text import strict_json, write_json
from moe_dist.metrics.run_lock import RunLock
from moe_dist.metrics.summary import flatten, missing_keys


class RunFolder:
    """Writer of one run's files, on rank 0.

    Attributes:
        path: the folder; its name is the run's, with a number if that name was taken.
    """

    def __init__(
        self,
        path: Path,
        lock: RunLock,
        *,
        tensorboard: bool = True,
        summary_copy: str | Path | None = None,
        step: int | None = None,
    ) -> None:
        """Open the folder's files.

        Args:
            lock: the folder's lock, released by `close`.
            step: step after which a run resumes; None: a new run.
        """
        self.path = path
        self._lock, self._summary_copy = lock, summary_copy
        self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = (path / "events.jsonl").open("a", encoding="utf-8")
        self._loads: TextIO | None = None
        self._board = _open_tensorboard(path / "tensorboard", step) if tensorboard else None
        self._last_step = step or 0

    @classmethod
    def create(
        cls,
        runs_dir: str | Path,
        name: str,
        config_yaml: str,
        *,
        tensorboard: bool = True,
        summary_copy: str | Path | None = None,
    ) -> Self:
        """Create a new folder, `<name>`, or `<name>-2`, `<name>-3`, ... if earlier runs have those names.

        Args:
            config_yaml: content of `config.yaml`.
            summary_copy: a file that also receives the summary (`--json FILE`).

        Raises:
            ConfigError: the folder cannot be created.
        """
        try:
            path = _claim_folder(Path(runs_dir), name)
        except OSError as error:
            raise ConfigError(f"runs_dir={str(runs_dir)!r}: cannot create a run folder: {error.strerror}") from error
        (path / "config.yaml").write_text(config_yaml, encoding="utf-8")
        return cls(path, RunLock(path), tensorboard=tensorboard, summary_copy=summary_copy)

    @classmethod
    def reopen(
        cls,
        path: Path,
        step: int,
        config_yaml: str,
        *,
        lock: RunLock | None = None,
        tensorboard: bool = True,
        summary_copy: str | Path | None = None,
    ) -> Self:
        """Reopen the folder of a run that resumes after `step`, and remove the lines of later steps.

        `events.jsonl` keeps its lines, since events are history; a summary of an earlier end is removed.

        Args:
            lock: the folder's lock, if the caller has acquired it.

        Raises:
            ConfigError: the folder cannot be written, or another job is writing it.
        """
        lock = lock or RunLock(path)
        try:
            for file in path.glob("*.jsonl"):
                _cut_back(file, None if file.name == "events.jsonl" else step)
            (path / "summary.json").unlink(missing_ok=True)
            (path / "config.yaml").write_text(config_yaml, encoding="utf-8")
        except OSError as error:
            lock.release()
            raise ConfigError(f"{path}: cannot resume this run: {error.strerror}") from error
        return cls(path, lock, tensorboard=tensorboard, summary_copy=summary_copy, step=step)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`, and each number in it to TensorBoard under its dotted key."""
        self._last_step = step
        self._write_line(self._metrics, {"step": step, "time": time.time(), **values})
        if self._board is not None:
            for key, value in flatten(values):
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(key.replace(".", "/", 1), value, step)

    def load(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to `load.jsonl`; a model without experts has no such file."""
        if self._loads is None:
            self._loads = (self.path / "load.jsonl").open("a", encoding="utf-8")
        self._write_line(self._loads, {"step": step, "time": time.time(), **values})

    def write_traffic(self, traffic: Mapping[str, Any]) -> None:
        """Write `traffic.json` atomically."""
        write_json(self.path / "traffic.json", traffic)

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Append a line to `events.jsonl`."""
        self._write_line(self._events, {"event": name, "step": step, "time": time.time(), **fields})

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json` (and its copy) atomically.

        Raises:
            MoeDistError: a file cannot be written.
            ValueError: a required key is missing.
        """
        if missing := missing_keys(summary):
            raise ValueError(f"summary lacks {', '.join(missing)}")
        write_json(self.path / "summary.json", summary)
        if self._summary_copy is not None:
            write_json(Path(self._summary_copy), summary)

    def close(self) -> None:
        """Close the files; may be called twice."""
        self._metrics.close()
        self._events.close()
        if self._loads is not None:
            self._loads.close()
        if self._board is not None:
            self._board.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.event("interrupted", self._last_step)
        elif error is not None:
            self.event("failed", self._last_step, error=f"{type(error).__name__}: {error}")
        self.close()

    @staticmethod
    def _write_line(file: Any, record: Mapping[str, Any]) -> None:
        file.write(strict_json(record) + "\n")
        file.flush()


def _claim_folder(runs_dir: Path, name: str) -> Path:
    """Create the first free folder; `mkdir` is atomic, so that two runs started together get different ones."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    path, number = runs_dir / name, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = runs_dir / f"{name}-{number}"


def _cut_back(file: Path, step: int | None) -> None:
    """Keep the lines up to `step` (None: all) of a file of JSON lines, and drop an incomplete last line."""
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            late = step is not None and record["step"] > step
        except (ValueError, KeyError, TypeError):
            continue
        if not late:
            kept.append(line + "\n")
    partial = file.with_name(f".{file.name}.{os.getpid()}.part")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(file)


def _open_tensorboard(path: Path, step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # imported here: it loads torch

    return SummaryWriter(log_dir=str(path), flush_secs=10, purge_step=None if step is None else step + 1)
