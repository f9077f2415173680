"""Final table of a run: the figures of `summary.json` for reading."""

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moe_dist.metrics.summary import look_up
from moe_dist.metrics.summary_rows import MISSING, costly, number_words, summary_rows

CURVE_ROWS = 10


def render_summary(
    summary: Mapping[str, Any], console: Console, folder: Path | None = None, picture: Path | None = None
) -> None:
    """Print a run's figures: the evaluation curve, then speed, size, traffic, balance, memory, files.

    Args:
        summary: the tree of `summary.json`; missing or null figures show as a dash.
        folder: the run's folder.
        picture: a picture of the run, named in the last line.
    """
    console.print()
    console.print(_headline(summary, folder.name if folder else None))
    if curve := look_up(summary, "validation.curve"):
        console.print(_curve_table(curve))
    console.print(_figures_table(summary, folder, picture))


def _headline(summary: Mapping[str, Any], name: str | None) -> Panel:
    loss, perplexity = (look_up(summary, f"validation.{key}") for key in ("loss", "perplexity"))
    text = Text.assemble(
        ("validation loss ", "dim"),
        (number_words(loss, ".4f"), "bold green"),
        ("   perplexity ", "dim"),
        (number_words(perplexity, ",.2f"), "bold green"),
        ("   after ", "dim"),
        (number_words(summary.get("tokens"), ",d"), "bold"),
        (" tokens, ", "dim"),
        (number_words(summary.get("steps"), ",d"), "bold"),
        (" steps", "dim"),
    )
    return Panel(text, title=name, border_style="green", expand=False)


def _curve_table(curve: Sequence[Mapping[str, Any]]) -> Table:
    points = [point for point in curve if point.get("loss") is not None]
    table = Table(box=None, padding=(0, 2), header_style="dim", title_justify="left")
    for name in ("tokens", "step", "val. loss", "change", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for point in _spread(points, CURVE_ROWS):
        loss = point["loss"]
        change, before = "" if before is None else f"{loss - before:+.4f}", loss
        table.add_row(
            number_words(point.get("tokens"), ",d"),
            number_words(point.get("step"), ",d"),
            f"{loss:.4f}",
            change,
            f"{exp(loss):,.2f}" if loss < 50 else MISSING,
        )
    return table


def _spread(points: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Return at most `most` points, evenly spaced, including the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _next_commands(folder: Path) -> str:
    """Return what can be done with a run: the report, and with its final weights evaluation and text."""
    with_weights = ("eval {}", "generate {} --prompt TEXT") if (folder / "final").is_dir() else ()
    return ", ".join(f"`moe-dist {command.format(folder)}`" for command in ("report {}", *with_weights))


def _figures_table(summary: Mapping[str, Any], folder: Path | None, picture: Path | None) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row()
    for name, words in summary_rows(summary):
        table.add_row(name, Text(words))
    for warning in costly(summary):
        table.add_row(Text("warning", "bold yellow"), Text(warning, "yellow"))
    if folder is not None:
        table.add_row("next", Text(_next_commands(folder)))
        table.add_row("files", Text(f"{folder}/", "bold"))
    if picture is not None:
        table.add_row("picture", Text(str(picture), "bold"))
    return table
