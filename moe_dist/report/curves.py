"""Curves of several runs over time: loss, throughput, memory, balance."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from moe_dist.report.read import RunFiles, series
from moe_dist.report.style import COLORS, color, figure

GIB = 2.0**30
MOST_NAMED = len(COLORS)
"""Runs up to which a legend names each; of more, the name is seen by pointing at a line."""


def loss(runs: Sequence[RunFiles]) -> go.Figure | None:
    """Draw training loss as a line and validation loss as marks joined by dashes, against tokens."""
    made = figure("tokens", "loss, nats per token", showlegend=len(runs) <= MOST_NAMED)
    for index, run in enumerate(runs):
        for key, word, style in (
            ("train.loss", "training", {"mode": "lines", "opacity": 0.6, "line": {"width": 1.3}}),
            ("validation.loss", "validation", {"mode": "lines+markers", "line": {"dash": "dash"}}),
        ):
            x, y = series(run.metrics, "tokens", key)
            if x:
                made.add_scatter(x=x, y=y, name=f"{escape(run.label)}, {word}", **style)
                made.data[-1].update(line_color=color(index, len(runs)))
    return made if made.data else None


def not_comparable(runs: Sequence[RunFiles]) -> str:
    """Return a note if the tokenizers or texts of runs are configured differently; else an empty string."""
    sections = {"tokenizer": "tokenizers", "corpus": "texts"}
    different = [
        word for key, word in sections.items() if any(run.config.get(key) != runs[0].config.get(key) for run in runs)
    ]
    if not different:
        return ""
    return f"Runs differ in their {' and '.join(different)} (see below): losses do not compare between such runs."


def throughput(runs: Sequence[RunFiles]) -> go.Figure | None:
    """Draw tokens/s of all ranks against steps; None if no run has logged them."""
    return _one_line_a_run(runs, "tokens_per_second", "tokens/s", {"rangemode": "tozero"})


def memory(runs: Sequence[RunFiles]) -> go.Figure | None:
    """Draw the largest rank's resident set over time, the smallest's as a thin line, and the device's memory if any."""
    made = figure("step", "GiB", yaxis_rangemode="tozero", showlegend=len(runs) <= MOST_NAMED)
    parts = (
        ("memory.rss_bytes_max", "largest rank", "solid"),
        ("memory.rss_bytes_min", "smallest rank", "dot"),
        ("memory.device_bytes_max", "device", "dash"),
    )
    for index, run in enumerate(runs):
        for key, word, dash in parts:
            x, y = series(run.metrics, "step", key)
            if any(y):
                name = f"{escape(run.label)}, {word}"
                made.add_scatter(x=x, y=[value / GIB for value in y], name=name, mode="lines")
                made.data[-1].update(line_color=color(index, len(runs)), line_dash=dash)
    return made if made.data else None


def balance(runs: Sequence[RunFiles]) -> go.Figure | None:
    """Draw cv² of expert loads against steps, on a logarithmic axis; None if no run has experts."""
    return _one_line_a_run(runs, "load.cv2", "cv² of expert loads", {"type": "log"})


def learning_rate(runs: Sequence[RunFiles]) -> go.Figure | None:
    """Draw the learning rate against steps; None if no run has logged it."""
    return _one_line_a_run(runs, "train.learning_rate", "learning rate", {"rangemode": "tozero"})


def gradient_norm(runs: Sequence[RunFiles]) -> go.Figure | None:
    """Draw the global gradient norm against steps; None if no run has logged it."""
    return _one_line_a_run(runs, "train.gradient_norm", "gradient norm", {"rangemode": "tozero"})


def _one_line_a_run(runs: Sequence[RunFiles], key: str, title: str, axis: dict[str, str]) -> go.Figure | None:
    made = figure("step", title)
    made.update_yaxes(**axis)
    for index, run in enumerate(runs):
        x, y = series(run.metrics, "step", key)
        if x:
            made.add_scatter(x=x, y=y, name=escape(run.label), mode="lines", line={"color": color(index, len(runs))})
    made.update_layout(showlegend=1 < len(runs) <= MOST_NAMED)
    return made if made.data else None
