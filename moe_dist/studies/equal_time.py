"""Numbers of steps that take equally long for every recipe: comparison at equal time instead of equal tokens.

Short interleaved runs measure the tokens per second of every recipe; the reference recipe keeps its steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from moe_dist.benchmarks.subruns import Summary
from moe_dist.errors import ConfigError, MoeDistError
from moe_dist.studies.runner import StudyCell, run_cells, speed

PROBE_STEPS = 20
PROBE = (
    f"train.steps={PROBE_STEPS}",
    f"train.eval_every={PROBE_STEPS}",
    "train.eval_sequences=2",
    "train.warmup_steps=0",
)


def steps_for_equal_time(
    todo: Sequence[StudyCell], baseline: str, folder: Path, jobs: int, report: Callable[[str], None]
) -> list[StudyCell]:
    """Return the same cells with the steps that each recipe trains in the time of the reference recipe.

    Args:
        baseline: reference recipe, whose cells keep their steps.
        folder: folder of the short runs' summaries, so that the same command finds the same steps again.
        jobs: runs at a time, as for the cells themselves.

    Raises:
        ConfigError: the reference is none of the recipes.
        MoeDistError: a short run failed.
    """
    if baseline not in {cell.value("recipe") for cell in todo}:
        recipes = ", ".join(dict.fromkeys(cell.value("recipe") for cell in todo))
        raise ConfigError(f"--equal-time {baseline}: not among the recipes that are run ({recipes})")
    short = {cell: replace(cell, overrides=(*cell.overrides, *PROBE)) for cell in todo}
    report(f"speed of each recipe: {len(short)} runs of {PROBE_STEPS} steps")
    outcomes = run_cells(
        list(short.values()),
        folder,
        lambda line: report(f"short run {line}"),
        speed,
        jobs=jobs,
    )
    results = {outcome.cell: outcome.summary for outcome in outcomes if outcome.summary}
    if failed := [cell.name for cell in todo if short[cell] not in results]:
        raise MoeDistError(f"short runs failed, so that no speed is known: {', '.join(failed)}; see {folder}")
    found = speeds(results)
    for recipe, tokens in found.items():
        report(f"{recipe}: {tokens:,.0f} tokens/s, {tokens / found[baseline]:.2f} of {baseline}")
    timed = []
    for cell in todo:
        steps = cell.load().train.steps * found[cell.value("recipe")] / found[baseline]
        timed.append(replace(cell, overrides=(*cell.overrides, f"train.steps={max(1, round(steps))}")))
    return timed


def speeds(results: Mapping[StudyCell, Summary]) -> dict[str, float]:
    """Return tokens per second of each recipe: the median over its short runs."""
    told: dict[str, list[float]] = {}
    for cell, summary in results.items():
        told.setdefault(cell.value("recipe"), []).append(summary["tokens_per_second"])
    return {recipe: median(values) for recipe, values in told.items()}
