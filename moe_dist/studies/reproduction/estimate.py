"""Cost of a reproduction on GPUs, predicted by the planner before anything is submitted."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from moe_dist.console import titled_table
from moe_dist.errors import ConfigError
from moe_dist.simulator.hardware import Fabric
from moe_dist.simulator.planner import GIB, plan
from moe_dist.studies.reproduction.cells import kind_of
from moe_dist.studies.runner import StudyCell

SKEW = 0.2
FINE_TUNING_TOKENS = 150e6
"""Tokens of all nine tasks of GLUE: 950,000 rows of about 50 tokens, three epochs."""


@dataclass(frozen=True)
class Cost:
    """Prediction for one training.

    Attributes:
        problem: reason for a missing prediction.
    """

    kind: str
    hours: float = 0.0
    gpus: int = 0
    gibibytes: float = 0.0
    evaluation_hours: float = 0.0
    layout: str = ""
    problem: str | None = None


def costs(cells: Sequence[StudyCell], fabric: Fabric) -> list[Cost]:
    """Predict each cell by the fastest layout that fits; evaluation as if fine-tuning were as fast as training."""
    return [_cost(cell, fabric) for cell in cells]


def _cost(cell: StudyCell, fabric: Fabric) -> Cost:
    if cell.refusal:
        return Cost(kind_of(cell), problem=cell.refusal)
    config = cell.load()
    try:
        best = plan(config, fabric, config.tokenizer.vocab_size, SKEW).best
    except ConfigError as error:
        return Cost(kind_of(cell), problem=str(error))
    assert best.time is not None
    return Cost(
        kind_of(cell),
        best.time.seconds * config.train.steps / 3600,
        fabric.ranks,
        best.memory.total / GIB,
        FINE_TUNING_TOKENS / best.time.tokens_per_second / 3600,
        best.layout.overrides,
    )


def render(found: Sequence[Cost], seeds: int, device: str, console: Console) -> None:
    """Print one line per kind, and the sum over all seeds."""
    table = titled_table(f"predicted cost on {device}, not measured")
    for name in ("kind", "hours", "GLUE, hours", "GPUs", "GiB a GPU", "GPU-hours, all seeds"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    total = 0.0
    for cost in found:
        if cost.problem:
            table.add_row(cost.kind, cost.problem)
            continue
        gpu_hours = (cost.hours + cost.evaluation_hours) * cost.gpus * seeds
        total += gpu_hours
        numbers = (f"{cost.hours:.2f}", f"{cost.evaluation_hours:.2f}", str(cost.gpus), f"{cost.gibibytes:.1f}")
        table.add_row(cost.kind, *numbers, f"{gpu_hours:,.1f}")
    console.print(table)
    console.print(
        f"in all {total:,.1f} GPU-hours for {seeds} seed(s); compare, do not quote: it was never run on a GPU"
    )
