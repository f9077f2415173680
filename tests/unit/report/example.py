"""A run folder with everything a report can show."""

import json
from pathlib import Path
from typing import Any

from tests.unit.metrics.example import summary

STEPS, EXPERTS, LAYERS = 40, 8, 2


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("moe: {kind: clustered}\n")
    steps = range(1, STEPS + 1)
    _write_lines(folder / "metrics.jsonl", [_metrics(step) for step in steps])
    _write_lines(folder / "load.jsonl", [_load(step) for step in steps])
    _write_lines(folder / "events.jsonl", _events())
    (folder / "summary.json").write_text(json.dumps(summary()))
    matrix = [[0, 2**20], [2**21, 0]]
    (folder / "traffic.json").write_text(
        json.dumps({"node_of_rank": [0, 0], "stages": {"one": {"bytes": matrix, "messages": [[0, 1], [1, 0]]}}})
    )
    parts = {"compute": 0.01, "all_to_all": 0.002, "reduction": 0.003, "waiting": 0.001}
    (folder / "profile.json").write_text(json.dumps({"ranks": [parts, parts]}))
    return folder


def _metrics(step: int) -> dict[str, Any]:
    line: dict[str, Any] = {
        "step": step,
        "tokens": step * 100,
        "tokens_per_second": 1000 + step,
        "train": {"loss": 5.0 / step, "learning_rate": 1e-3, "gradient_norm": 0.5},
        "memory": {"rss_bytes_max": 10**9, "rss_bytes_min": 9 * 10**8, "device_bytes_max": 0},
        "load": {"cv2": 0.1},
    }
    return {**line, "validation": {"loss": 5.1 / step}} if step % 10 == 0 else line


def _load(step: int) -> dict[str, Any]:
    counts = [[step + expert for expert in range(EXPERTS)] for _ in range(LAYERS)]
    level = {"max_over_mean": 1.5}
    behind = [[0, step, 0], [0, 0, 1]]
    return {
        "step": step,
        "experts": counts,
        "behind": behind,
        "load": {**level, "cluster": level, "rank": level, "dropped": 0.01},
    }


def _events() -> list[dict[str, Any]]:
    start = [[0, 1, 2, 3], [4, 5, 6, 7]]
    later = [[0, 1, 2, 4], [3, 5, 6, 7]]
    moved = {"moved_experts": 2, "bytes": 12345, "seconds": 0.25, "loss_before": 2.5, "loss_after": 2.625}
    return [
        {"event": "placement", "step": 0, "members": [start, start]},
        {"event": "recluster", "step": 20, "layer": 1, "members": later, **moved},
        {"event": "finished", "step": STEPS},
    ]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
