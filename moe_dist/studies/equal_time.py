"""Numbers of steps that take equally long for every recipe: comparison at equal time instead of equal tokens.

Short interleaved runs measure the tokens per second of every recipe; the reference recipe keeps its steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from moe_dist.benchmarks.subruns import Summary
from moe_dist.config import load_config
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.studies.quality import QualityCell, run_cells

PROBE_STEPS = 20
PROBE = (
    f"train.steps={PROBE_STEPS}",
    f"train.eval_every={PROBE_STEPS}",
    "train.eval_sequences=2",
    "train.warmup_steps=0",
)


def steps_for_equal_time(
    todo: Sequence[QualityCell], yardstick: str, folder: Path, jobs: int, report: Callable[[str], None]
) -> list[QualityCell]:
    """Return the same cells with the steps that each recipe trains in the time of the reference recipe.

    Args:
        yardstick: reference recipe, whose cells keep their steps.
        folder: folder of the short runs' summaries, so that the same command finds the same steps again.
        jobs: runs at a time, as for the cells themselves.

    Raises:
        ConfigError: the reference is none of the recipes.
        MoeDistError: a short run failed.
    """
    if yardstick not in {cell.recipe for cell in todo}:
        recipes = ", ".join(dict.fromkeys(cell.recipe for cell in todo))
        raise ConfigError(f"--equal-time {yardstick}: not among the recipes that are run ({recipes})")
    short = {cell: _probe(cell) for cell in todo}
    report(f"how fast each recipe is: {len(short)} runs of {PROBE_STEPS} steps")
    results = run_cells(list(short.values()), folder, jobs, lambda line: report(f"short run {line}"))
    if failed := [cell.name for cell in todo if short[cell] not in results]:
        raise MoeDistError(f"short runs failed, so that no speed is known: {', '.join(failed)}; see {folder}")
    speed = speeds(results)
    for recipe, tokens_per_second in speed.items():
        report(
            f"{recipe}: {tokens_per_second:,.0f} tokens/s, {tokens_per_second / speed[yardstick]:.2f} of {yardstick}"
        )
    return [_stretched(cell, speed[cell.recipe] / speed[yardstick]) for cell in todo]


def speeds(results: Mapping[QualityCell, Summary]) -> dict[str, float]:
    """Return tokens per second of each recipe: the median over its short runs."""
    told: dict[str, list[float]] = {}
    for cell, summary in results.items():
        told.setdefault(cell.recipe, []).append(summary["tokens_per_second"])
    return {recipe: median(values) for recipe, values in told.items()}


def _probe(cell: QualityCell) -> QualityCell:
    return replace(cell, overrides=(*cell.overrides, *PROBE))


def _stretched(cell: QualityCell, factor: float) -> QualityCell:
    steps = load_config(cell.config, cell.overrides).train.steps
    return replace(cell, overrides=(*cell.overrides, f"train.steps={max(1, round(steps * factor))}"))
