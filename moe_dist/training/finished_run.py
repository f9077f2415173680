"""Resumption of a run that is complete: its summary is shown again."""

import json
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.compatibility import check_same_model
from moe_dist.checkpoint.find import agreed, is_checkpoint
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.store import FINAL
from moe_dist.config import RunConfig
from moe_dist.console import wide_console
from moe_dist.metrics import missing_keys, render_summary, write_json
from moe_dist.training.resume import run_to_go_on


def show_if_finished(config: RunConfig, rank: int) -> bool:
    """Show the summary of the run to resume if it is complete, and return True if so; collective.

    Raises:
        CheckpointError: the run is complete, but its configuration has another model.
    """
    run = run_to_go_on(config)
    summary = agreed(None if run is None else _summary_of(run, config.train.steps))
    if run is None or summary is None:
        return False
    if is_checkpoint(run / FINAL):
        check_same_model(read_manifest(run / FINAL), config)
    if rank == 0:
        if config.summary_copy is not None:
            write_json(Path(config.summary_copy), summary)
        print(f"{run} has completed all {config.train.steps} steps: nothing is left to do", flush=True)
        render_summary(summary, wide_console(), run)
    return True


def _summary_of(run: Path, steps: int) -> dict[str, Any] | None:
    """Return a run's summary if it has completed `steps` steps, else None."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(summary, dict) and not missing_keys(summary)
    return summary if whole and summary["steps"] == steps else None
