"""Clustered experts against their baselines: the same text, tokens and steps, several seeds, one table.

Each cell (recipe, corpus, seed) is a `moe-dist train` process, or a `moe-dist launch` if its recipe has several ranks,
so that one command repeats any cell alone. A finished cell is a JSON file named by a hash of its configuration and of
this package's source; it is not run again.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.benchmarks import subruns
from moe_dist.benchmarks.subruns import PACKAGE, Summary
from moe_dist.config import load_config
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.metrics.summary import look_up

RECIPES = ("dense", "standard-aux", "standard-bias", "cheap", "good")
YARDSTICKS = ("standard-aux", "standard-bias")


@dataclass(frozen=True)
class QualityCell:
    """One run of the comparison."""

    recipe: str
    corpus: str
    seed: int
    config: Path
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name in messages, of the run folder and of the result file: `RECIPE-CORPUS-SEED`."""
        return f"{self.recipe}-{self.corpus}-{self.seed}"

    def result_file(self, folder: Path) -> Path:
        """Return the file of its summary; another configuration or other code has another file."""
        return subruns.result_file(folder, self.name, load_config(self.config, self.overrides), PACKAGE)


def cells(
    configs: Path, corpora: Mapping[str, Sequence[str]], seeds: int, recipes: Sequence[str], overrides: Sequence[str]
) -> list[QualityCell]:
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
                    raise ConfigError(f"{config}: no such recipe; give --configs, the folder that holds it")
                words = (*selection, *overrides, f"seed={seed}", "world.threads=1", "tensorboard=false")
                load_config(config, words)
                found.append(QualityCell(recipe, corpus, seed, config, words))
    return found


def run_cells(
    todo: Sequence[QualityCell], folder: Path, jobs: int, report: Callable[[str], None]
) -> dict[QualityCell, Summary]:
    """Run the missing cells, `jobs` at a time; report a cell that fails and continue with the others."""
    folder.mkdir(parents=True, exist_ok=True)

    def finish(cell: QualityCell) -> tuple[QualityCell, Summary | None]:
        file = cell.result_file(folder)
        if not file.exists():
            report(f"{cell.name}: running")
            if problem := _train(cell, file, folder):
                report(f"{cell.name}: failed: {problem}")
                return cell, None
        summary: Summary = json.loads(file.read_text(encoding="utf-8"))
        report(f"{cell.name}: validation loss {summary['validation']['loss']:.4f}")
        return cell, summary

    with ThreadPoolExecutor(jobs) as pool:
        return {cell: summary for cell, summary in pool.map(finish, todo) if summary is not None}


def _train(cell: QualityCell, file: Path, folder: Path) -> str | None:
    """Train one cell; return the last line of its error, None after success."""
    world = load_config(cell.config, cell.overrides).world
    alone = (world.data or 1) * (world.cluster or 1) * world.shard == 1
    command = ["train"] if alone else ["launch", "--launcher", "local"]
    words = [*cell.overrides, f"name={cell.name}", f"runs_dir={json.dumps(str(folder / 'runs'))}"]
    return subruns.run([sys.executable, "-m", "moe_dist", *command, str(cell.config), *words, "--json", str(file)])


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


def rows(results: dict[QualityCell, Summary]) -> list[QualityRow]:
    """Return one row for each corpus and recipe, in the order of the cells."""
    groups: dict[tuple[str, str], list[tuple[QualityCell, Summary]]] = {}
    for cell, summary in results.items():
        groups.setdefault((cell.corpus, cell.recipe), []).append((cell, summary))
    found = []
    for (corpus, recipe), members in sorted(groups.items(), key=lambda item: item[0][0]):
        parameters = members[0][1]["parameters"]
        variances = [summary["load"]["variance"] for _, summary in members]
        share = parameters["expert"] / parameters["expert_standard"] if parameters["expert_standard"] else None
        losses = {cell.seed: summary["validation"]["loss"] for cell, summary in members}
        stored = {cell.seed: loss for cell, summary in members if (loss := look_up(summary, "validation.loss_stored"))}
        variance = None if None in variances else mean(variances)
        seconds = mean(summary["seconds"] for _, summary in members)
        found.append(QualityRow(recipe, corpus, losses, stored, share, variance, members[0][1]["steps"], seconds))
    return found


def differences(table: Sequence[QualityRow], row: QualityRow, yardstick: str) -> list[float]:
    """Return the loss less that of a baseline, seed by seed, on the same corpus; empty if the baseline was not run."""
    base = next((other for other in table if (other.corpus, other.recipe) == (row.corpus, yardstick)), None)
    if base is None:
        return []
    return [loss - base.losses[seed] for seed, loss in row.losses.items() if seed in base.losses]


def render(results: dict[QualityCell, Summary], console: Console) -> None:
    """Print the table."""
    table = rows(results)
    view = Table(title="validation loss, nats a token (mean ± standard deviation over seeds)", title_justify="left")
    stored = any(row.stored for row in table)
    less_yardsticks = (f"less {yardstick}" for yardstick in YARDSTICKS)
    names = ("corpus", "recipe", "loss", *(("as stored",) if stored else ()), *less_yardsticks)
    for name in (*names, "expert parameters", "load variance", "steps", "seconds", "seeds"):
        view.add_column(name, justify="left" if name in ("corpus", "recipe") else "right")
    for row in table:
        view.add_row(
            row.corpus,
            row.recipe,
            f"{mean(row.losses.values()):.4f} ± {row.spread:.4f}",
            *((f"{mean(row.stored.values()):.4f}" if row.stored else "-",) if stored else ()),
            *(_with_range(differences(table, row, yardstick)) for yardstick in YARDSTICKS),
            "-" if row.expert_share is None else f"{row.expert_share:.1%}",
            "-" if row.load_variance is None else f"{row.load_variance:.1e}",
            f"{row.steps:,}",
            f"{row.seconds:,.0f}",
            str(len(row.losses)),
        )
    console.print(view)


def _with_range(values: Sequence[float]) -> str:
    return f"{mean(values):+.3f} ({min(values):+.3f} to {max(values):+.3f})" if values else "-"


def to_dict(results: dict[QualityCell, Summary]) -> dict[str, Any]:
    """Return the figures for `--json`: the table, and every cell's summary."""
    table = rows(results)
    return {
        "rows": [
            {**vars(row), "difference": {base: differences(table, row, base) for base in YARDSTICKS}} for row in table
        ],
        "cells": [{"recipe": c.recipe, "corpus": c.corpus, "seed": c.seed, **s} for c, s in results.items()],
    }


def require_all(results: dict[QualityCell, Summary], wanted: Sequence[QualityCell]) -> None:
    """Raise a MoeDistError that names the failed cells, if there are any."""
    if failed := [cell.name for cell in wanted if cell not in results]:
        raise MoeDistError(f"{len(failed)} of {len(wanted)} runs failed: {', '.join(failed)}")
