"""Folder of one run, `runs/<name>/`: a contract for people and tools (docs/metrics.md).

    config.yaml     the resolved configuration
    metrics.jsonl   one JSON object per logged step
    load.jsonl      one JSON object per logged step: copies routed to each expert, cluster and rank
    traffic.json    bytes and messages from rank to rank over the whole run
    events.jsonl    one JSON object per event: evaluations, re-clusterings, checkpoints, faults, end of the run
    tensorboard/    the metrics again, for TensorBoard
    summary.json    the figures of the finished run
    .lock           held while a job writes the folder

Lines are written whole and at once, so that the folder of a run that is interrupted or killed is readable.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moe_dist.errors import EXIT_REFUSED, ConfigError, MoeDistError
from moe_dist.metrics.append_file import AppendFile
from moe_dist.metrics.json_text import strict_json, write_json
from moe_dist.metrics.run_lock import RunLock
from moe_dist.metrics.summary import missing_keys
from moe_dist.metrics.tensorboard import open_board, scalars


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class RunFolder:
    """Writer of one run's files, on rank 0.

    A full disk loses nothing: what cannot be written stays in memory and is written when that is possible again. A
    folder that is removed is made again, without what it held.

    Attributes:
        path: the folder; its name is the run's, with a number if that name was taken.
    """

    def __init__(
        self,
        path: Path,
        lock: RunLock,
        config_yaml: str,
        *,
        tensorboard: bool = True,
        summary_copy: str | Path | None = None,
        step: int | None = None,
        warn: Callable[[str], None] = _to_stderr,
    ) -> None:
        """Open the folder's files.

        Args:
            lock: the folder's lock, released by `close`.
            config_yaml: content of `config.yaml`.
            step: step after which a run resumes; None: a new run.
            warn: called with a line when files can no longer be written, and when they can be again.
        """
        self.path = path
        self._lock, self._summary_copy, self._warn = lock, summary_copy, warn
        self._kept = {"config.yaml": config_yaml.encode()}
        self._metrics = AppendFile(path / "metrics.jsonl")
        self._events = AppendFile(path / "events.jsonl", b"" if step is None else _first_line(path / "events.jsonl"))
        self._loads = AppendFile(path / "load.jsonl")
        self._board = open_board(path, step) if tensorboard else None
        self._last_step, self._is_new = step or 0, step is None
        self._foreign = False
        self._trouble: str | None = None
        self._append(self._metrics, b"")
        self._append(self._events, b"")

    @classmethod
    def create(
        cls,
        runs_dir: str | Path,
        name: str,
        config_yaml: str,
        **options: Any,
    ) -> Self:
        """Create a new folder, `<name>`, or `<name>-2`, `<name>-3`, ... if earlier runs have those names.

        Args:
            config_yaml: content of `config.yaml`.
            options: further arguments of the constructor.

        Raises:
            ConfigError: the folder cannot be created.
        """
        try:
            path = _claim_folder(Path(runs_dir), name)
            (path / "config.yaml").write_text(config_yaml, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"runs_dir={str(runs_dir)!r}: cannot create a run folder: {error.strerror}") from error
        return cls(path, RunLock(path), config_yaml, **options)

    @classmethod
    def reopen(
        cls,
        path: Path,
        step: int,
        config_yaml: str,
        *,
        lock: RunLock | None = None,
        **options: Any,
    ) -> Self:
        """Reopen the folder of a run that resumes after `step`, and remove the lines of later steps.

        `events.jsonl` keeps its lines, since events are history; a summary of an earlier end is removed.

        Args:
            lock: the folder's lock, if the caller has acquired it.
            options: further arguments of the constructor.

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
        return cls(path, lock, config_yaml, step=step, **options)

    def keep(self, name: str, content: bytes) -> None:
        """Write a file that belongs to the run, and write it again if the folder is removed.

        Raises:
            ConfigError: it cannot be written.
        """
        self._kept[name] = content
        try:
            (self.path / name).write_bytes(content)
        except OSError as error:
            raise ConfigError(
                f"{self.path / name}: cannot be written: {error.strerror}: free space, or choose another runs_dir"
            ) from error

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to `metrics.jsonl`, and each number in it to TensorBoard under its dotted key."""
        self._last_step = step
        self._append_line(self._metrics, {"step": step, "time": time.time(), **values})
        if self._board is not None:
            self._append(self._board, scalars(step, values))

    def load(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to `load.jsonl`; a model without experts has no such file."""
        self._append_line(self._loads, {"step": step, "time": time.time(), **values})

    def write_traffic(self, traffic: Mapping[str, Any]) -> None:
        """Write `traffic.json` atomically."""
        write_json(self.path / "traffic.json", traffic)

    def event(self, name: str, step: int, **fields: Any) -> None:
        """Append a line to `events.jsonl`."""
        line = {"event": name, "step": step, "time": time.time(), **fields}
        self._append_line(self._events, line)
        if not self._events.header:
            self._events.header = _encoded(line)  # names the run, for a later resumption

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
        for file in self._files():
            if file.pending:
                self._append(file, b"")
        if lost := [file.path.name for file in self._files() if file.pending or file.dropped]:
            self._warn(f"warning: {self.path}: the last records of {', '.join(lost)} are lost ({self._trouble})")
        for file in self._files():
            file.close()
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.event("interrupted", self._last_step)
        elif self._is_refused(error):
            self.close()
            shutil.rmtree(self.path, ignore_errors=True)  # a refusal leaves nothing behind
            return
        elif error is not None:
            self.event("failed", self._last_step, error=f"{type(error).__name__}: {error}")
        self.close()

    def _is_refused(self, error: BaseException | None) -> bool:
        refused = isinstance(error, MoeDistError) and error.exit_code == EXIT_REFUSED
        return refused and self._is_new and not self._last_step and not self._foreign

    def _files(self) -> list[AppendFile]:
        return [self._metrics, self._events, self._loads, *([] if self._board is None else [self._board])]

    def _append_line(self, file: AppendFile, record: Mapping[str, Any]) -> None:
        self._append(file, _encoded(record))

    def _append(self, file: AppendFile, record: bytes) -> None:
        try:
            self._make_again_if_removed()
            if self._foreign:
                return
            if file is self._board:
                file.path.parent.mkdir(exist_ok=True)
            file.append(record)
        except OSError as error:
            self._warn_once(file, error)
            return
        if self._trouble is not None and not any(file.pending for file in self._files()):
            self._trouble = None
            dropped = sum(file.dropped for file in self._files())
            lost = f"{dropped} records are lost" if dropped else "no metric or event is lost"
            self._warn(f"{self.path} can be written again: {lost}")

    def _warn_once(self, file: AppendFile, error: OSError) -> None:
        if self._trouble is None:
            self._warn(
                f"warning: {file.path} cannot be written: {error.strerror}: training continues, and keeps metrics and "
                f"events in memory until {self.path} can be written"
            )
        self._trouble = error.strerror

    def _make_again_if_removed(self) -> None:
        """Create the folder again if it was removed, with its configuration and the other files kept for it.

        Raises:
            OSError: it cannot be created.
            ConfigError: another job uses a folder of that name by now.
        """
        if self._foreign or self._lock.in_place():
            return
        removed = not (self.path / "config.yaml").exists()
        if removed:
            self.path.mkdir(parents=True, exist_ok=True)
            for name, content in self._kept.items():
                (self.path / name).write_bytes(content)
        self._lock.release()
        try:
            self._lock = RunLock(self.path)
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            self._foreign = True
            raise
        if removed:
            self._warn(
                f"warning: {self.path} was removed during the run: its metrics and checkpoints of up to step "
                f"{self._last_step} are lost; the folder is created again and training continues"
            )


def _encoded(record: Mapping[str, Any]) -> bytes:
    return (strict_json(record) + "\n").encode()


def _first_line(file: Path) -> bytes:
    try:
        with file.open("rb") as lines:
            return lines.readline()
    except OSError:
        return b""


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
