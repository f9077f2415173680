"""PNG plots of a reproduction; a plot without figures is left out.

Shapes: C logged steps (or bins of several), L layers, E experts.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_dist.report.maps import load_counts, membership_history
from moe_dist.report.read import read_runs
from moe_dist.studies.reproduction.figures import KindRow, Result

FRONTIERS = {  # file name -> figure on the x-axis, its label
    "loss-parameters": ("parameters", "parameters of the whole model"),
    "loss-work": ("active_work", "forward FLOPs of the feed-forward part, per token and layer"),
    "loss-bytes": ("bytes_per_token_layer", "all-to-all, bytes per token and layer"),
}


def plot_all(results: Sequence[Result], table: Sequence[KindRow], folder: Path) -> list[Path]:
    """Write every plot that has figures; return the files."""
    bytes_label, variance_label = "all-to-all, bytes per token and layer", "load variance (log)"
    makers: dict[str, Callable[[Any], bool]] = {
        "loss-tokens": partial(_loss_curves, results=results),
        "bytes-token": partial(_bars, table=table, name="bytes_per_token_layer", label=bytes_label),
        "load-variance": partial(_bars, table=table, name="load_variance", label=variance_label, log=True),
    }
    for name, (x, label) in FRONTIERS.items():
        makers[name] = partial(_frontier, table=table, name=x, label=label)
    for result in results:
        if result.seed == 0 and result.run is not None and result.run.is_dir():
            makers[f"load-map-{result.kind}"] = partial(_load_map, run=result.run)
            makers[f"membership-{result.kind}"] = partial(_membership, run=result.run)
    written = []
    for name, make in makers.items():
        figure = Figure(figsize=(8, 5), layout="constrained")
        FigureCanvasAgg(figure)
        if make(figure):
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def _loss_curves(figure: Any, results: Sequence[Result]) -> bool:
    panel = figure.subplots()
    for kind in dict.fromkeys(result.kind for result in results):
        curves = [r.summary["validation"]["curve"] for r in results if r.kind == kind and r.summary is not None]
        points: dict[float, list[float]] = {}
        for curve in curves:
            for point in curve:
                points.setdefault(point["tokens"], []).append(point["loss"])
        tokens = sorted(points)
        if not tokens:
            continue
        (line,) = panel.plot(tokens, [np.mean(points[t]) for t in tokens], marker="o", markersize=3, label=kind)
        low, high = ([end(points[t]) for t in tokens] for end in (min, max))
        panel.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return _finished(panel, "tokens", "validation loss, nats per token")


def _frontier(figure: Any, table: Sequence[KindRow], name: str, label: str) -> bool:
    """Draw one point per kind, with its spread; left and below is better."""
    panel = figure.subplots()
    for row in table:
        x, y = row.middle(name), row.middle("loss")
        if x is not None and y is not None:
            panel.errorbar(
                [x], [y], yerr=[row.spread("loss") or 0.0], marker="o", capsize=3, linestyle="", label=row.kind
            )
    return _finished(panel, label, "validation loss, nats per token")


def _bars(figure: Any, table: Sequence[KindRow], name: str, label: str, log: bool = False) -> bool:
    panel = figure.subplots()
    shown = [(row.kind, middle, row.spread(name) or 0.0) for row in table if (middle := row.middle(name))]
    if not shown:
        return False
    kinds, middles, spreads = zip(*shown, strict=True)
    panel.barh(kinds, middles, xerr=spreads, color="#4878a8")
    panel.invert_yaxis()
    panel.set_xlabel(label)
    if log:
        panel.set_xscale("log")
    return True


def _finished(panel: Any, x: str, y: str) -> bool:
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.grid(alpha=0.3)
    has_lines = bool(panel.get_legend_handles_labels()[0])
    if has_lines:
        panel.legend(fontsize=8)
    return has_lines


def _load_map(figure: Any, run: Path) -> bool:
    """Draw the load of each expert over the mean load, one panel per layer."""
    steps, counts_CLE = load_counts(read_runs([run])[0].loads)
    if not steps:
        return False
    panels = figure.subplots(1, counts_CLE.shape[1], squeeze=False)[0]
    for layer, panel in enumerate(panels):
        mean_C1 = counts_CLE[:, layer].mean(axis=1, keepdims=True)
        image = panel.imshow(
            (counts_CLE[:, layer] / np.maximum(mean_C1, 1e-9)).T,
            aspect="auto",
            origin="lower",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            extent=(steps[0], steps[-1] + 1, 0, counts_CLE.shape[2]),
        )
        _titled(panel, layer)
    figure.colorbar(image, ax=panels, label="load / mean")
    return True


def _membership(figure: Any, run: Path) -> bool:
    """Draw the cluster of each expert over time, one panel per layer."""
    read = read_runs([run])[0]
    history = membership_history(read.events)
    if not history:
        return False
    clusters = 1 + max(max(state) for states in history.values() for _, state in states)
    panels = figure.subplots(1, len(history), squeeze=False)[0]
    for (layer, states), panel in zip(sorted(history.items()), panels, strict=True):
        edges = [*(step for step, _ in states), max(read.last_step, states[-1][0] + 1)]
        cluster_EC = np.array([state for _, state in states]).T
        colours = {"cmap": "tab10", "vmin": -0.5, "vmax": clusters - 0.5}
        image = panel.pcolormesh(edges, np.arange(len(cluster_EC) + 1), cluster_EC, **colours)
        _titled(panel, layer)
    figure.colorbar(image, ax=panels, label="cluster", ticks=range(clusters))
    return True


def _titled(panel: Any, layer: int) -> None:
    panel.set_title(f"layer {layer + 1}", fontsize=10)
    panel.set_xlabel("step")
    panel.set_ylabel("expert")
