"""Quality of clustered experts against their baselines: the same text, tokens and steps, several seeds, one table.

Each cell (recipe, corpus, seed) is a `moe-dist launch` of its own, so that one command repeats any cell alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from moe_dist.benchmarks.subruns import Summary
from moe_dist.config import load_config
from moe_dist.console import titled_table
from moe_dist.errors import ConfigError
from moe_dist.metrics.summary import look_up
from moe_dist.studies.runner import StudyCell

RECIPES = ("dense", "standard-aux", "standard-bias", "cheap", "good")
BASELINES = ("standard-aux", "standard-bias")


def cells(
    configs: Path, corpora: Mapping[str, Sequence[str]], seeds: int, recipes: Sequence[str], overrides: Sequence[str]
) -> list[StudyCell]:
    """Return all runs of the comparison, seed by seed, so that an early stop leaves complete rows.

    Args:
        configs: folder of the `quality-<recipe>.yaml` files.
        corpora: name -> overrides that select the text.

    Raises:
        ConfigError: a recipe has no file, or a configuration is refused.
    """
    found = []
    for seed in range(seeds):
        for corpus, selection in corpora.items():
            for recipe in recipes:
                config = configs / f"quality-{recipe}.yaml"
                if not config.is_file():
                    raise ConfigError(f"{config}: no such recipe: give --configs, the folder of its file")
                words = (*selection, *overrides, f"seed={seed}", "world.threads=1", "tensorboard=false")
                world = load_config(config, words).world
                ranks = (world.data or 1) * (world.cluster or 1) * world.shard
                found.append(StudyCell((("recipe", recipe), ("corpus", corpus)), ranks, seed, config, words))
    return found


@dataclass(frozen=True)
class QualityRow:
    """Result of a recipe on a corpus over its seeds."""

    recipe: str
    corpus: str
    losses: dict[int, float]
    stored: dict[int, float]
    """Validation losses with experts quantized as stored, by seed; empty without quantization."""
    expert_share: float | None
    """Expert parameters over those of standard experts."""
    load_variance: float | None
    steps: int
    seconds: float
    """Training time, mean over seeds."""

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one."""
        return stdev(self.losses.values()) if len(self.losses) > 1 else 0.0


def rows(results: dict[StudyCell, Summary]) -> list[QualityRow]:
    """Return one row for each corpus and recipe, in the order of the cells."""
    groups: dict[tuple[str, str], list[tuple[StudyCell, Summary]]] = {}
    for cell, summary in results.items():
        groups.setdefault((cell.value("corpus"), cell.value("recipe")), []).append((cell, summary))
    found = []
    for (corpus, recipe), members in sorted(groups.items(), key=lambda item: item[0][0]):
        parameters = members[0][1]["parameters"]
        variances = [summary["load"]["variance"] for _, summary in members]
        share = parameters["expert"] / parameters["expert_standard"] if parameters["expert_standard"] else None
        losses = {cell.repeat: summary["validation"]["loss"] for cell, summary in members}
        stored = {
            cell.repeat: loss for cell, summary in members if (loss := look_up(summary, "validation.loss_stored"))
        }
        variance = None if None in variances else mean(variances)
        seconds = mean(summary["seconds"] for _, summary in members)
        found.append(QualityRow(recipe, corpus, losses, stored, share, variance, members[0][1]["steps"], seconds))
    return found


def differences(table: Sequence[QualityRow], row: QualityRow, baseline: str) -> list[float]:
    """Return the loss less that of a baseline, seed by seed, on the same corpus; empty if the baseline was not run."""
    base = next((other for other in table if (other.corpus, other.recipe) == (row.corpus, baseline)), None)
    if base is None:
        return []
    return [loss - base.losses[seed] for seed, loss in row.losses.items() if seed in base.losses]


def render(results: dict[StudyCell, Summary], console: Console) -> None:
    """Print the table."""
    table = rows(results)
    view = titled_table("validation loss, nats per token (mean ± standard deviation over seeds)")
    stored = any(row.stored for row in table)
    less_baselines = (f"less {baseline}" for baseline in BASELINES)
    names = ("corpus", "recipe", "loss", *(("as stored",) if stored else ()), *less_baselines)
    for name in (*names, "expert parameters", "load variance", "steps", "seconds", "seeds"):
        view.add_column(name, justify="left" if name in ("corpus", "recipe") else "right")
    for row in table:
        view.add_row(
            row.corpus,
            row.recipe,
            f"{mean(row.losses.values()):.4f} ± {row.spread:.4f}",
            *((f"{mean(row.stored.values()):.4f}" if row.stored else "-",) if stored else ()),
            *(_with_range(differences(table, row, baseline)) for baseline in BASELINES),
            "-" if row.expert_share is None else f"{row.expert_share:.1%}",
            "-" if row.load_variance is None else f"{row.load_variance:.1e}",
            f"{row.steps:,}",
            f"{row.seconds:,.0f}",
            str(len(row.losses)),
        )
    console.print(view)


def _with_range(values: Sequence[float]) -> str:
    return f"{mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})" if values else "-"


def to_dict(results: dict[StudyCell, Summary]) -> dict[str, Any]:
    """Return the figures for `--json`: the table, and every cell's summary."""
    table = rows(results)
    return {
        "rows": [
            {**vars(row), "difference": {base: differences(table, row, base) for base in BASELINES}} for row in table
        ],
        "cells": [{**dict(c.values), "seed": c.repeat, **s} for c, s in results.items()],
    }
