"""Run a golden case and read what is compared of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from moe_dist.checkpoint.export import export_weights
from moe_dist.checkpoint.trained_weights import find_weights
from moe_dist.config import load_config
from moe_dist.training.trainer import train
from tests.distributed.ranks import run_ranks
from tests.golden.cases import CASES, COMMON, OLD_WORDS

SMOKE = Path(__file__).parents[2] / "configs" / "test" / "smoke.yaml"
BUDGET = 100_000
"""Bytes for offloaded clusters: fewer than a rank of the case holds."""


def figures_of(case: str, folder: Path, old_words: bool) -> dict[str, Any]:
    """Run a case; return its losses, gradient norms and loads by step, its moves, and hashes of its final weights."""
    ranks, overrides = CASES[case]
    words = [word.format(budget=BUDGET) for word in (*COMMON, *overrides)]
    if old_words:
        words = [OLD_WORDS.get(word, word) for word in words]
    run_ranks(_train, ranks, [f"runs_dir={folder}/runs", f"corpus.cache_dir={folder}/cache", "name=run", *words])
    run = folder / "runs" / "run"
    figures = {"steps": _steps(run), "loads": _lines(run / "load.jsonl"), "moved": _moves(run), "weights": _hashes(run)}
    summary = json.loads((run / "summary.json").read_text())
    return figures | {
        "validation": [point["loss"] for point in summary["validation"]["curve"]],
        "stored": summary["validation"]["loss_stored"],
        "bytes": summary["all_to_all"]["bytes"],
    }


def _train(words: list[str]) -> None:
    train(load_config(SMOKE, words))


def _lines(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def _steps(run: Path) -> list[Any]:
    lines = [line for line in _lines(run / "metrics.jsonl") if "train" in line]
    return [[line["step"], line["train"]["loss"], line["train"]["gradient_norm"], line.get("load")] for line in lines]


def _moves(run: Path) -> list[Any]:
    kept = ("step", "experts_moved", "moved", "layers", "objective_before", "objective_after", "bytes")
    return [
        {key: event[key] for key in kept if key in event}
        for event in _lines(run / "events.jsonl")
        if event["event"].startswith("recluster")
    ]


def _hashes(run: Path) -> list[str]:
    """Sorted hashes of the exported tensors, whatever their names."""
    file = run / "weights.safetensors"
    export_weights(find_weights(run), file)
    tensors = load_file(file).values()
    return sorted(hashlib.sha256(tensor.contiguous().view(-1).numpy().tobytes()).hexdigest()[:16] for tensor in tensors)
