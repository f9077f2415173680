"""Tables of the report as HTML; every word from a run is escaped."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from moe_dist.metrics.summary import look_up
from moe_dist.report.read import RunFiles, number

MISSING = "-"
FEW_NUMBERS = 6
"""Numbers up to which a list is shown as it is."""
MOST_EVENTS = 200
LONGEST_WORD = 20
"""Characters up to which a word is never broken."""
MOST_COLUMNS = 8
"""Runs up to which each has a column of the comparison."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of plain text as an HTML table that scrolls sideways if it is too wide."""
    cells = "".join(f"<tr>{''.join(_cell('td', cell) for cell in row)}</tr>" for row in rows)
    heads = "".join(_cell("th", word) for word in head)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'


def _cell(tag: str, text: str) -> str:
    """Return a cell, in which only words that are longer than a column's minimum may be broken."""
    broken = any(len(word) > LONGEST_WORD for word in text.split())
    return f"<{tag}{' class=long' if broken else ''}>{escape(text)}</{tag}>"


FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("validation loss", "validation.loss", lambda value: f"{value:.4f}"),
    ("perplexity", "validation.perplexity", lambda value: f"{value:,.2f}"),
    ("tokens", "tokens", lambda value: f"{value:,.0f}"),
    ("tokens/s", "tokens_per_second", lambda value: f"{value:,.0f}"),
    ("parameters", "parameters.total", lambda value: f"{value:,.0f}"),
    ("in experts", "parameters.expert", lambda value: f"{value:,.0f}"),
    ("standard experts would have", "parameters.expert_standard", lambda value: f"{value:,.0f}"),
    ("all-to-all, B per token and layer", "all_to_all.bytes_per_token_layer", lambda value: f"{value:,.1f}"),
    ("between nodes, bytes", "all_to_all.bytes_inter_node", lambda value: f"{value:,.0f}"),
    ("load variance", "load.variance", lambda value: f"{value:.2e}"),
    ("load cv²", "load.cv2", lambda value: f"{value:.4f}"),
    ("dropped", "load.dropped", lambda value: f"{value:.2%}"),
    ("peak resident memory, largest rank, MiB", "memory.peak_rss_bytes", lambda value: f"{value / 2**20:,.0f}"),
    ("peak device memory, MiB", "memory.peak_device_bytes", lambda value: f"{value / 2**20:,.0f}"),
)


def by_run(runs: Sequence[RunFiles], rows: Sequence[Sequence[str]], corner: str = "") -> str:
    """Return rows of a title and a cell of each run as a table, with a row for each run if there are many."""
    names = [run.label for run in runs]
    if len(runs) <= MOST_COLUMNS:
        return table([corner, *names], rows)
    columns = [[row[index + 1] for row in rows] for index in range(len(runs))]
    turned = [[name, *cells] for name, cells in zip(names, columns, strict=True)]
    return f'<div class="many">{table(["", *(row[0] for row in rows)], turned)}</div>'


def comparison(runs: Sequence[RunFiles]) -> str:
    """Return the figures of each run, without those that no run has."""
    rows = [["ended", *(run.status for run in runs)], ["layout", *(_layout(run) for run in runs)]]
    for title, key, form in FIGURES:
        values = [number(run.summary, key) for run in runs]
        if any(value is not None for value in values):
            rows.append([title, *(MISSING if value is None else form(value) for value in values)])
    return by_run(runs, rows)


def _layout(run: RunFiles) -> str:
    kind = run.summary.get("kind") or look_up(run.config, "moe.kind") or MISSING
    world = run.summary.get("world")
    axes = world.items() if isinstance(world, dict) else ()
    shown = (
        axis if size is True else f"{axis} {size}" for axis, size in axes if size is True or size not in (None, 0, 1)
    )
    return ", ".join([str(kind), *shown])


SOURCES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("tokens", "tokens", lambda value: f"{value:,.0f}"),
    ("epochs", "epochs", lambda value: f"{value:.2f}"),
    ("validation loss", "validation_loss", lambda value: f"{value:.4f}"),
    ("padding", "padding", lambda value: f"{value:.2%}"),
    ("documents cut", "cut_documents", lambda value: f"{value:.1%}"),
)


def sources(run: RunFiles) -> str:
    """Return the sources of a blend: draws, losses, packing; empty without a blend."""
    found = look_up(run.summary, "data.sources")
    if not isinstance(found, dict) or len(found) < 2:
        return ""
    rows = []
    for name, figures in found.items():
        values = [(number(figures, key) if isinstance(figures, dict) else None, form) for _, key, form in SOURCES]
        rows.append([str(name), *(MISSING if value is None else form(value) for value, form in values)])
    return table(["source", *(title for title, _, _ in SOURCES)], rows)


RECLUSTER = {
    "step": "step",
    "layer": "layer",
    "moved_experts": "moved",
    "dropped_experts": "rejected",
    "bytes": "bytes",
    "relocation_bytes": "of clusters",
    "seconds": "seconds",
    "loss_before": "loss before",
    "loss_after": "after",
    "guard_loss_increase": "guard",
    "objective_before": "similarity before",
    "objective_after": "after",
    "error": "error",
}
"""Columns by their field of an event."""
RECLUSTER_NOTE = (
    "Moved, rejected: experts that changed clusters, and whose move the guard refused because the loss would have "
    "increased. Bytes: sent between ranks; of clusters: the part of whole clusters that changed ranks. Guard: relative "
    "increase of the loss by the moves. Similarity: of the experts within clusters, less the weighted imbalance of "
    "their loads."
)


def reclusterings(run: RunFiles) -> str:
    """Return the re-clusterings: moved experts, bytes, time, and change of loss and objective; empty without any."""
    events = [event for event in run.events if event.get("event") == "recluster"]
    if not events:
        return ""
    shown = [column for column in RECLUSTER if any(column in event for event in events)]
    rows = [[_text(event.get(column, MISSING)) for column in shown] for event in events[-MOST_EVENTS:]]
    return table([RECLUSTER[column] for column in shown], rows) + f'<p class="note">{RECLUSTER_NOTE}</p>'


def other_events(run: RunFiles) -> str:
    """Return all other events; evaluations are left out, since the curve shows them."""
    hidden = ("evaluation", "recluster", "placement")
    events = [event for event in run.events if event.get("event") not in hidden]
    rows = []
    for event in events[-MOST_EVENTS:]:
        told = {key: value for key, value in event.items() if key not in ("event", "step", "time")}
        details = (f"{key}: {_text(value)}" for key, value in told.items() if value is not None and value is not False)
        rows.append([str(event.get("event", MISSING)), str(event.get("step", MISSING)), ", ".join(details)])
    return table(["event", "step", ""], rows) if rows else ""


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return MISSING if value is None else "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items()) or "none"
    if isinstance(value, list) and (numbers := _numbers(value)):
        return f"{len(numbers):,} numbers from {min(numbers):.4g} to {max(numbers):.4g}"
    text = "; ".join(map(_text, value)) or "none" if isinstance(value, list) else str(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _numbers(values: list[Any]) -> list[float]:
    """Return the numbers of nested lists; nothing if there are a few only, or anything else is among them."""
    found: list[float] = []
    for value in values:
        if isinstance(value, list):
            inner = _numbers_of(value)
            if inner is None:
                return []
            found += inner
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append(value)
        else:
            return []
    return found if len(found) > FEW_NUMBERS else []


def _numbers_of(values: list[Any]) -> list[float] | None:
    plain = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    return list(values) if plain else None
