"""Terminal tables of a traffic measurement."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moe_dist.console import titled_table
from moe_dist.metrics.summary import look_up

MATRIX_RANKS = 16


def render(results: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print bytes per token and layer of each kind by payload, the matrices between ranks, and the profile."""
    console.print(_kinds(results))
    for kind, figures in results.items():
        for stage, content in figures["stages"].items():
            if len(content["bytes"]) <= MATRIX_RANKS:
                console.print(_matrix(f"{kind}, stage {stage}", content["bytes"], figures["steps"]))
    if any("profile" in figures for figures in results.values()):
        console.print(_profile(results))


def _kinds(results: Mapping[str, Mapping[str, Any]]) -> Table:
    table = titled_table("all-to-all, bytes per token and layer, all ranks, both passes")
    table.add_column("")
    for kind in results:
        table.add_column(kind, justify="right")

    def row(name: str, *key: str) -> None:
        values = []
        for figures in results.values():
            value = look_up(figures, ".".join(key))
            values.append("-" if value is None else f"{value / figures['tokens'] / figures['layers']:,.1f}")
        table.add_row(name, *values)

    row("in all", "bytes")
    for axis in ("payload", "stage", "direction", "link"):
        names = dict.fromkeys(name for figures in results.values() for name in figures["bytes_by"].get(axis, ()))
        for name in names:
            if any(look_up(figures, f"bytes_by.{axis}.{name}") for figures in results.values()):
                row(f"  {axis} {name.replace('_', '-')}", "bytes_by", axis, name)
    row("least possible for its routing", "lower_bound", "bytes")
    row("  between nodes", "lower_bound", "bytes_inter_node")
    table.add_row("messages a step", *(f"{figures['messages_per_step']:,.0f}" for figures in results.values()))
    seconds = [figures.get("step_seconds") for figures in results.values()]
    table.add_row("step, ms (median)", *("-" if value is None else f"{1000 * value:,.1f}" for value in seconds))
    return table


def _matrix(title: str, rows: list[list[int]], steps: int) -> Table:
    table = titled_table(f"{title}: KiB per step from rank (row) to rank")
    table.add_column("")
    for peer in range(len(rows)):
        table.add_column(str(peer), justify="right")
    for rank, row in enumerate(rows):
        table.add_row(str(rank), *(f"{size / 1024 / steps:,.1f}" if size else "-" for size in row))
    return table


def _profile(results: Mapping[str, Mapping[str, Any]]) -> Table:
    table = titled_table("time of a step, collectives synchronised (mean over ranks)")
    shown = {kind: figures["profile"]["ranks"] for kind, figures in results.items() if "profile" in figures}
    table.add_column("")
    for kind in shown:
        table.add_column(kind, justify="right")
    for part in next(iter(shown.values()))[0]:
        cells = []
        for ranks in shown.values():
            seconds = float(np.mean([rank[part] for rank in ranks]))
            total = float(np.mean([sum(rank.values()) for rank in ranks]))
            cells.append(f"{1000 * seconds:,.1f} ms  {seconds / total:.0%}")
        table.add_row(part.replace("_", "-"), *cells)
    return table
