"""Table of a study: medians and spread over repeats, and efficiency against the ideal line."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from moe_dist.console import titled_table
from moe_dist.metrics.summary import look_up
from moe_dist.studies.runner import StudyOutcome
from moe_dist.studies.scaling.cells import RANKS

FIGURES = {
    "tokens_per_second": "tokens_per_second",
    "bytes_per_token_layer": "all_to_all.bytes_per_token_layer",
    "bytes_inter_node": "all_to_all.bytes_inter_node",
    "peak_rss_bytes": "memory.peak_rss_bytes",
    "peak_device_bytes": "memory.peak_device_bytes",
    "validation_loss": "validation.loss",
}


@dataclass(frozen=True)
class StudyRow:
    """Result of one combination of the axes' values over its repeats.

    Attributes:
        figures: name in FIGURES -> values of the finished repeats.
        efficiency: median tokens/s over that of the fewest ranks times the ratio of ranks; 1 is the ideal line. None
            without a comparison.
        problems: reasons for repeats without a result.
    """

    values: tuple[tuple[str, str], ...]
    ranks: int
    figures: dict[str, list[float]]
    problems: tuple[str, ...]
    efficiency: float | None = None

    def middle(self, name: str) -> float | None:
        """Return the median of a figure over the repeats; None if no repeat has it."""
        return median(self.figures[name]) if self.figures.get(name) else None

    @property
    def others(self) -> tuple[tuple[str, str], ...]:
        """Values of all axes except the ranks, which identify a line in a plot."""
        return tuple((axis, value) for axis, value in self.values if axis != RANKS)


def rows(outcomes: Sequence[StudyOutcome]) -> list[StudyRow]:
    """Return one row for each combination, in the cells' order."""
    groups: dict[tuple[tuple[str, str], ...], list[StudyOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.cell.values, []).append(outcome)
    found = [_row(values, members) for values, members in groups.items()]
    return [StudyRow(**{**vars(row), "efficiency": _efficiency(row, found)}) for row in found]


def _row(values: tuple[tuple[str, str], ...], members: Sequence[StudyOutcome]) -> StudyRow:
    summaries = [outcome.summary for outcome in members if outcome.summary]
    figures = {
        name: [float(value) for summary in summaries if (value := look_up(summary, key)) is not None]
        for name, key in FIGURES.items()
    }
    problems = tuple(dict.fromkeys(outcome.problem for outcome in members if outcome.problem))
    return StudyRow(values, members[0].cell.ranks, figures, problems)


def _efficiency(row: StudyRow, found: Sequence[StudyRow]) -> float | None:
    speed = row.middle("tokens_per_second")
    peers = [other for other in found if other.others == row.others and other.middle("tokens_per_second")]
    if speed is None or len({other.ranks for other in peers}) < 2:
        return None
    first = min(peers, key=lambda other: other.ranks)
    base = first.middle("tokens_per_second")
    assert base is not None
    return speed / (base * row.ranks / first.ranks)


def render(table_rows: Sequence[StudyRow], console: Console) -> None:
    """Print the table; a combination without results shows its reason."""
    axes = [axis for axis, _ in table_rows[0].values]
    view = titled_table("medians over repeats")
    for name in (*axes, "tokens/s", "from - to", "efficiency", "B/token/layer", "inter-node B", "RSS, MiB", "runs"):
        view.add_column(name, justify="right")
    for row in table_rows:
        speeds = row.figures["tokens_per_second"]
        rss = row.middle("peak_rss_bytes")
        view.add_row(
            *(value for _, value in row.values),
            _shown(row.middle("tokens_per_second"), ",.0f"),
            f"{min(speeds):,.0f} - {max(speeds):,.0f}" if speeds else "-",
            _shown(row.efficiency, ".0%"),
            _shown(row.middle("bytes_per_token_layer"), ",.1f"),
            _shown(row.middle("bytes_inter_node"), ",.0f"),
            _shown(None if rss is None else rss / 2**20, ",.0f"),
            str(len(speeds)),
        )
    console.print(view)
    for row in table_rows:
        for problem in row.problems:
            values = ", ".join(f"{axis}={value}" for axis, value in row.values)
            console.print(f"{values or 'the one cell'}: {problem}", markup=False, highlight=False, soft_wrap=True)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def write_csv(outcomes: Sequence[StudyOutcome], table_rows: Sequence[StudyRow], folder: Path) -> None:
    """Write `cells.csv`, one line per run, failed ones included, and `table.csv`, one line per combination."""
    axes = [axis for axis, _ in outcomes[0].cell.values]
    with (folder / "cells.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*axes, "ranks_started", "repeat", *FIGURES, "problem"])
        for outcome in outcomes:
            summary: dict[str, Any] = outcome.summary or {}
            figures = [look_up(summary, key, "") for key in FIGURES.values()]
            values = [value for _, value in outcome.cell.values]
            writer.writerow([*values, outcome.cell.ranks, outcome.cell.repeat, *figures, outcome.problem or ""])
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        spread = [f"{name}_{end}" for name in FIGURES for end in ("median", "min", "max")]
        writer.writerow([*axes, "ranks_started", "runs", "efficiency", *spread])
        for row in table_rows:
            ends = [end for name in FIGURES for end in _ends(row.figures[name])]
            values = [value for _, value in row.values]
            runs = len(row.figures["tokens_per_second"])
            writer.writerow([*values, row.ranks, runs, "" if row.efficiency is None else row.efficiency, *ends])


def _ends(values: list[float]) -> list[float | str]:
    return [median(values), min(values), max(values)] if values else ["", "", ""]


def to_dict(table_rows: Sequence[StudyRow]) -> dict[str, Any]:
    """Return the figures for `--json`."""
    return {"rows": [{**vars(row), "values": dict(row.values)} for row in table_rows]}
