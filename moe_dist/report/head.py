"""Head of the report: each run's identity and three main figures, features at work, differences of configurations."""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from moe_dist.metrics.summary import flatten, look_up
from moe_dist.metrics.summary_rows import costly, summary_rows
from moe_dist.report.read import RunFiles, number
from moe_dist.report.tables import MISSING, by_run, table

MOST_CARDS = 6
"""Runs up to which each has a card; more are in the table alone."""
NOT_COMPARED = ("name", "runs_dir", "summary_copy")
LONGEST_VALUE = 80


def cards(runs: Sequence[RunFiles]) -> str:
    """Return a card for each run; nothing if there are many."""
    if len(runs) > MOST_CARDS:
        return ""
    return f'<div class="cards">{"".join(map(_card, runs))}</div>'


def _card(run: RunFiles) -> str:
    lines = [run.status, _when(run), _identity(run), look_up(run.summary, "device"), _versions(run)]
    shown = "".join(f"<p>{escape(str(line))}</p>" for line in lines if line)
    numbers = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(name)}</span><span>{escape(beside or ' ')}</span></div>"
        for name, value, beside in _main_figures(run)
    )
    return f'<article><h2>{escape(run.label)}</h2>{shown}<div class="big">{numbers}</div></article>'


def _main_figures(run: RunFiles) -> list[tuple[str, str, str]]:
    """Return name, value and what stands beside it of the three main figures."""

    def shown(key: str, form: str) -> str:
        value = number(run.summary, key)
        return MISSING if value is None else format(value, form)

    def beside(key: str, form: str, words: str) -> str:
        return "" if number(run.summary, key) is None else f"{words} {shown(key, form)}"

    return [
        ("validation loss", shown("validation.loss", ".4f"), beside("validation.perplexity", ",.2f", "perplexity")),
        ("tokens/s", shown("tokens_per_second", ",.0f"), beside("tokens_per_second_per_device", ",.0f", "a device")),
        (
            "bytes per token and layer",
            shown("all_to_all.bytes_per_token_layer", ",.0f"),
            beside("all_to_all.flat_bytes_per_token_layer", ",.0f", "flat routing"),
        ),
    ]


def _when(run: RunFiles) -> str:
    times = [time for line in run.events if (time := number(line, "time")) is not None and 0 < time < 1e11]
    if not times:
        return ""
    start, minutes = datetime.fromtimestamp(min(times), UTC), (max(times) - min(times)) / 60
    return f"{start:%Y-%m-%d %H:%M} UTC, {minutes:,.1f} min"


def _identity(run: RunFiles) -> str:
    sizes = [("model.layers", "layers"), ("model.hidden_size", "wide"), ("moe.experts", "experts")]
    words = [f"{value} {word}" for key, word in sizes if (value := look_up(run.config, key)) is not None]
    kind = look_up(run.config, "moe.kind")
    return ", ".join([*([str(kind)] if kind else []), *words])


def _versions(run: RunFiles) -> str:
    found = run.summary.get("versions")
    if not isinstance(found, dict):
        return ""
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def differences(runs: Sequence[RunFiles]) -> str:
    """Return the keys whose values differ between the runs' configurations; empty if there are none."""
    trees = [dict(flatten(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for tree in trees for key in tree) if key not in NOT_COMPARED]
    rows = [[key, *(_value(tree.get(key)) for tree in trees)] for key in keys]
    different = [row for row in rows if len(set(row[1:])) > 1]
    if len(runs) < 2 or not different:
        return ""
    return "<h2>Where the configurations differ</h2>" + by_run(runs, different, "key")


def configuration(run: RunFiles) -> str:
    """Return the whole configuration, folded away."""
    rows = [[str(key), _value(value)] for key, value in flatten(run.config)]
    return f"<details><summary>Configuration</summary>{table(['key', 'value'], rows)}</details>" if rows else ""


def _value(value: Any) -> str:
    """Return a configuration's value as YAML writes it on one line; a dash for null and for an empty list."""
    if isinstance(value, bool):
        return str(value).lower()
    empty = value is None or value == []
    text = MISSING if empty else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]} ..."


def at_work(run: RunFiles) -> str:
    """Return a row for each feature at work, and warnings of what was costly."""
    try:
        rows = [[name, words] for name, words in summary_rows(run.summary)] if run.summary else []
        warnings = list(costly(run.summary))
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError):  # a damaged summary
        return ""
    shown = "".join(f'<p class="problem">{escape(warning)}</p>' for warning in warnings)
    return f"<h3>At work</h3>{table(['', ''], rows)}{shown}" if rows else ""
