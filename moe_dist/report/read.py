"""Reader of run folders for a report; broken, half-written or missing parts are left out and listed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe_dist.errors import ConfigError
from moe_dist.metrics.summary import look_up

Line = dict[str, Any]
ENDINGS = ("finished", "measured", "stopped", "interrupted", "failed")


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run folder, as far as they can be read.

    Attributes:
        label: name in the report: the folder's name, with the parent's if two are the same.
        problems: one line for each part that could not be read.
    """

    label: str
    path: Path
    config: Line = field(default_factory=dict)
    summary: Line = field(default_factory=dict)
    traffic: Line = field(default_factory=dict)
    profile: Line = field(default_factory=dict)
    metrics: list[Line] = field(default_factory=list)
    loads: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """Last step that any file contains."""
        lines = [*self.metrics, *self.events, *self.loads]
        return max((int(step) for line in lines if (step := number(line, "step")) is not None), default=0)

    @property
    def status(self) -> str:
        """State of the run in words."""
        told = [event for event in self.events if event.get("event") in (*ENDINGS, "resumed")]
        if told and (last := told[-1])["event"] != "resumed":
            error = f": {last['error']}" if "error" in last else ""
            return f"{last['event']} at step {last.get('step', '?')}{error}"
        if self.summary:
            return f"finished at step {self.summary.get('steps', '?')}"
        return f"not finished: still running, or killed after step {self.last_step}"


def read_runs(paths: Sequence[Path]) -> list[RunFiles]:
    """Read every folder.

    Raises:
        ConfigError: a path is no folder, or contains nothing of a run.
    """
    folders = [path.resolve() for path in paths]
    names = [folder.name for folder in folders]
    return [
        _read_run(path, folder.name if names.count(folder.name) == 1 else f"{folder.parent.name}/{folder.name}")
        for path, folder in zip(paths, folders, strict=True)
    ]


def _read_run(path: Path, label: str) -> RunFiles:
    if not path.is_dir():
        raise ConfigError(f"{path}: is no run folder: give a folder such as runs/demo, which training has made")
    names = ("config.yaml", "metrics.jsonl", "events.jsonl", "load.jsonl", "summary.json", "traffic.json")
    if not any((path / name).exists() for name in names):
        raise ConfigError(f"{path}: holds none of {', '.join(names)}: is it the folder of one run?")
    problems: list[str] = []
    events = _read_lines(path / "events.jsonl", problems)
    if not (path / "summary.json").exists() and not any(event.get("event") == "measured" for event in events):
        problems.insert(0, "no summary.json: the run has not ended by itself")
    return RunFiles(
        label,
        path,
        config=_read_config(path / "config.yaml", problems),
        summary=_read_object(path / "summary.json", problems),
        traffic=_read_object(path / "traffic.json", problems),
        profile=_read_object(path / "profile.json", problems),
        metrics=_read_lines(path / "metrics.jsonl", problems),
        loads=_read_lines(path / "load.jsonl", problems),
        events=events,
        problems=problems,
    )


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        problems.append(f"{path.name}: cannot be read: {error.strerror}")
        return ""


def _read_config(path: Path, problems: list[str]) -> Line:
    try:
        tree = yaml.safe_load(_text(path, problems))
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ):  # constructors of values
        problems.append(f"{path.name}: is not valid YAML")
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_object(path: Path, problems: list[str]) -> Line:
    text = _text(path, problems)
    found = _json_object(text) if text else {}
    if found is None:
        problems.append(f"{path.name}: is not a JSON object")
    return found or {}


def _read_lines(path: Path, problems: list[str]) -> list[Line]:
    rows = [_json_object(row) for row in _text(path, problems).splitlines() if row.strip()]
    good = [row for row in rows if row is not None]
    if len(good) < len(rows):
        problems.append(f"{path.name}: {len(rows) - len(good)} of {len(rows)} lines are broken and left out")
    return good


def _json_object(text: str) -> Line | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def number(tree: Line, key: str) -> float | None:
    """Return the finite number under a dotted key; None without one."""
    value = look_up(tree, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) < float("inf") else None


def series(lines: Sequence[Line], x: str, y: str, most: int = 1500) -> tuple[list[float], list[float]]:
    """Return the points (x, y) of the lines that have both, thinned to about `most`, the last one kept."""
    points = [(a, b) for line in lines if (a := number(line, x)) is not None and (b := number(line, y)) is not None]
    stride = max(1, len(points) // most)
    kept = points[: len(points) - 1 : stride] + points[-1:]
    return [a for a, _ in kept], [b for _, b in kept]
