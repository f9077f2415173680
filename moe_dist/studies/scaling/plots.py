"""Plots of a study: speed beside the ideal line, efficiency, bytes, memory; against ranks, or the first axis."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_dist.studies.scaling.cells import RANKS
from moe_dist.studies.scaling.tables import StudyRow

Value = Callable[[StudyRow], float | None]


def plot(rows: Sequence[StudyRow], target: Path) -> None:
    """Write a PNG of four panels; combinations without a result have no point."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    over_ranks = any(axis == RANKS for axis, _ in rows[0].values)
    panels: tuple[tuple[str, Value], ...] = (
        ("tokens/s", lambda row: row.middle("tokens_per_second")),
        ("efficiency", lambda row: row.efficiency),
        ("all-to-all, bytes per token and layer", lambda row: row.middle("bytes_per_token_layer")),
        ("peak resident memory of a rank, MiB", lambda row: (peak := row.middle("peak_rss_bytes")) and peak / 2**20),
    )
    for panel, (title, value) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        _panel(panel, rows, value, over_ranks)
        panel.set_title(title, loc="left", fontsize=10)
        panel.margins(y=0.12)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    speed, efficiency = figure.axes[:2]
    if over_ranks:
        _ideal(speed, rows)
        efficiency.axhline(1, linestyle=":", color="grey")
    if speed.get_legend_handles_labels()[0]:
        speed.legend(fontsize=8)
    figure.savefig(target, dpi=120)


def _panel(panel: Any, rows: Sequence[StudyRow], value: Value, over_ranks: bool) -> None:
    for label, members in _lines(rows, over_ranks).items():
        points = [(_place(row, over_ranks), y) for row in members if (y := value(row)) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), marker="o", label=label)
    if over_ranks:
        panel.set_xticks(sorted({row.ranks for row in rows}))
    panel.set_xlabel("ranks" if over_ranks else rows[0].values[0][0] if rows[0].values else "")


def _lines(rows: Sequence[StudyRow], over_ranks: bool) -> dict[str, list[StudyRow]]:
    lines: dict[str, list[StudyRow]] = {}
    for row in rows:
        others = row.others if over_ranks else row.values[1:]
        lines.setdefault(", ".join(f"{axis} {value}" for axis, value in others) or "measured", []).append(row)
    return lines


def _place(row: StudyRow, over_ranks: bool) -> int | str:
    return row.ranks if over_ranks else (row.values[0][1] if row.values else "")


def _ideal(panel: Any, rows: Sequence[StudyRow]) -> None:
    """Draw the ideal line of each curve: speed of its fewest ranks times the ratio of ranks."""
    for index, members in enumerate(_lines(rows, over_ranks=True).values()):
        measured = [(row.ranks, speed) for row in members if (speed := row.middle("tokens_per_second")) is not None]
        if len(measured) > 1:
            ranks = sorted(rank for rank, _ in measured)
            first = min(measured)
            ideal = [first[1] * rank / first[0] for rank in ranks]
            panel.plot(ranks, ideal, linestyle=":", color="grey", label=None if index else "ideal")
