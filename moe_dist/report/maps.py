"""Figures of one run: load heat map and balance, cluster membership, traffic matrix, time of a step.

Shapes: L layers, E experts, G clusters, C columns (logged steps, or bins of several), R ranks or rows.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go

from moe_dist.report.read import Line, RunFiles, number, series
from moe_dist.report.style import categories, chooser, figure

MOST_COLUMNS = 120
MOST_CELLS = 200_000
Floats = npt.NDArray[np.float64]


def load_map(run: RunFiles) -> go.Figure | None:
    """Draw each expert's load over the mean load, step by step; a menu above the figure selects the layer."""
    steps, counts_CLE = load_counts(run.loads)
    if not steps:
        return None
    mean_CL1 = counts_CLE.mean(axis=2, keepdims=True)
    over_mean = np.divide(counts_CLE, mean_CL1, out=np.zeros_like(counts_CLE), where=mean_CL1 > 0)
    colors = {"zmin": 0, "zmid": 1, "zmax": 2, "colorscale": "RdBu_r"}
    return _maps_of_layers(steps, over_mean.round(3), "expert", "load / mean", "of the mean", colors)


def behind_map(run: RunFiles) -> go.Figure | None:
    """Draw for how many steps each offloaded cluster has had no tokens; a menu above the figure selects the layer."""
    found = [(number(line, "step"), _matrix(line.get("behind"))) for line in run.loads]
    good = [(step, behind_LG) for step, behind_LG in found if step is not None and behind_LG is not None]
    good = [pair for pair in good if pair[1].shape == good[0][1].shape]
    if not any(behind_LG.any() for _, behind_LG in good):
        return None
    good = [good[part[-1]] for part in np.array_split(np.arange(len(good)), min(len(good), MOST_COLUMNS))]
    behind_CLG = np.stack([behind_LG for _, behind_LG in good])
    colors = {"zmin": 0, "zmax": behind_CLG.max(), "colorscale": "Blues"}
    return _maps_of_layers([step for step, _ in good], behind_CLG, "cluster", "steps", "updates deferred", colors)


def _maps_of_layers(
    steps: Sequence[float], values_CLR: Floats, row: str, title: str, unit: str, colors: dict[str, Any]
) -> go.Figure:
    """Draw a heat map of each layer, steps by rows R, and a menu of the layers."""
    columns, layers, rows = values_CLR.shape
    shown = _some_layers(layers, MOST_CELLS // (columns * rows))
    first = next((index for index, layer in enumerate(shown) if values_CLR[:, layer].any()), 0)  # none that is all 0
    made = figure("step", row, margin={"l": 56, "r": 12, "t": 40, "b": 40})
    for layer in shown:
        made.add_heatmap(
            x=steps,
            z=values_CLR[:, layer].T.tolist(),
            colorbar={"thickness": 10, "title": {"text": title}},
            visible=layer == shown[first],
            hovertemplate=f"step %{{x}}, {row} %{{y}}: %{{z}} {unit}<extra></extra>",
            **colors,
        )
    made.update_layout(updatemenus=chooser([f"layer {layer + 1} of {layers}" for layer in shown], first))
    return made


def load_counts(lines: Sequence[Line]) -> tuple[list[float], Floats]:
    """Return steps and copies [C, L, E] of the lines that agree in shape with the first good one, binned in time."""
    good: list[tuple[float, Floats]] = []
    for line in lines:
        counts_LE, step = _matrix(line.get("experts")), number(line, "step")
        if counts_LE is None or step is None or (good and counts_LE.shape != good[0][1].shape):
            continue
        good.append((step, counts_LE))
    if not good:
        return [], np.zeros((0, 0, 0))
    bins = np.array_split(np.arange(len(good)), min(len(good), MOST_COLUMNS))
    return [good[part[-1]][0] for part in bins], np.stack([sum(good[i][1] for i in part) for part in bins])


def _matrix(value: Any) -> Floats | None:
    """Return a non-empty two-dimensional array of numbers; None for anything else."""
    try:
        made = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    return made if made.ndim == 2 and made.size and np.isfinite(made).all() else None


def _some_layers(layers: int, most: int) -> list[int]:
    """Return all layers, or evenly spread ones up to the page's limit."""
    return sorted({round(layer) for layer in np.linspace(0, layers - 1, max(1, min(layers, most)))})


BALANCE = (
    ("load.max_over_mean", "experts", "solid"),
    ("load.rank.max_over_mean", "ranks", "solid"),
    ("load.cluster.max_over_mean", "clusters", "dash"),  # drawn last: often equal to the ranks'
)


def balance(run: RunFiles) -> go.Figure | None:
    """Draw busiest over mean of experts, clusters and ranks, and the dropped share."""
    made = figure("step", "busiest / mean")
    for key, name, dash in BALANCE:
        x, y = series(run.loads, "step", key)
        if x:
            made.add_scatter(x=x, y=y, name=name, mode="lines", line={"dash": dash, "width": 2})
    x, y = series(run.loads, "step", "load.dropped")
    if any(y):
        made.add_scatter(x=x, y=y, name="dropped share (right)", mode="lines", yaxis="y2", line={"dash": "dot"})
        made.update_layout(yaxis2={"overlaying": "y", "side": "right", "rangemode": "tozero", "showgrid": False})
        made.update_layout(margin={"r": 48})
    return made if made.data else None


def membership(run: RunFiles) -> go.Figure | None:
    """Draw the cluster of each expert from one re-clustering to the next; empty if a run has no records of it."""
    history = membership_history(run.events)
    if not history:
        return None
    layers = sorted(history)
    shown = max(range(len(layers)), key=lambda index: _changes(history[layers[index]]))
    made = figure("step", "expert", margin={"l": 56, "r": 12, "t": 40, "b": 40})
    for index, states in enumerate(history[layer] for layer in layers):
        steps = [step for step, _ in states]
        experts = max(len(cluster_E) for _, cluster_E in states)
        clusters = 1 + max(max(cluster_E) for _, cluster_E in states)
        made.add_heatmap(
            x=[*steps, max(run.last_step, steps[-1] + 1)],  # edges: a state holds until the next
            y=list(range(experts)),
            z=[[cluster_E[e] if e < len(cluster_E) else None for _, cluster_E in states] for e in range(experts)],
            colorscale=categories(clusters),
            zmin=-0.5,
            zmax=clusters - 0.5,
            colorbar={"thickness": 10, "title": {"text": "cluster"}, "dtick": max(1, clusters // 16), "tick0": 0},
            visible=index == shown,
            hovertemplate="from step %{x}, expert %{y}: cluster %{z}<extra></extra>",
        )
    made.update_layout(updatemenus=chooser([f"layer {layer + 1}" for layer in layers], shown))
    return made


def _changes(states: Sequence[tuple[float, list[int]]]) -> int:
    """Return the changes of cluster of all experts of a layer."""
    pairs = itertools.pairwise(cluster_E for _, cluster_E in states)
    return sum(old != new for before, after in pairs for old, new in zip(before, after, strict=False))


def membership_history(events: Iterable[Line]) -> dict[int, list[tuple[float, list[int]]]]:
    """Return for each layer (step, cluster of each expert) after each event that lists the members."""
    found: dict[int, list[tuple[float, list[int]]]] = {}
    for event in events:
        step = number(event, "step")
        if event.get("event") not in ("placement", "recluster") or step is None:
            continue
        for layer, members in _members_by_layer(event):
            cluster_E = {e: cluster for cluster, held in enumerate(members) for e in held}
            if sorted(cluster_E) != list(range(len(cluster_E))):
                continue
            states = found.setdefault(layer, [])
            state = [cluster_E[e] for e in range(len(cluster_E))]
            if not states or states[-1][1] != state:
                states.append((step, state))
    return {layer: states for layer, states in found.items() if states}


def _members_by_layer(event: Line) -> list[tuple[int, list[list[int]]]]:
    """Return the clusters of one layer; `members` holds those of every layer, or of the event's one `layer`."""
    members, layer = event.get("members"), event.get("layer")
    if _is_clusters(members) and isinstance(layer, int):
        return [(layer, members)]  # type: ignore[list-item]
    if isinstance(members, list):
        return [(index, clusters) for index, clusters in enumerate(members) if _is_clusters(clusters)]
    return []


def _is_clusters(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(cluster, list) and all(isinstance(e, int) for e in cluster) for cluster in value)
    )


def traffic(run: RunFiles) -> go.Figure | None:
    """Draw MiB from each rank to each, one stage at a time."""
    stages = run.traffic.get("stages")
    matrices = {
        str(stage): matrix
        for stage, content in (stages.items() if isinstance(stages, dict) else ())
        if isinstance(content, dict) and (matrix := _matrix(content.get("bytes"))) is not None
    }
    if not matrices:
        return None
    made = figure("to rank", "from rank", margin={"l": 56, "r": 12, "t": 40, "b": 40})
    for index, matrix in enumerate(matrices.values()):
        made.add_heatmap(
            z=(matrix / 2**20).round(3).tolist(),
            colorscale="Blues",
            colorbar={"thickness": 10, "title": {"text": "MiB"}},
            visible=index == 0,
            hovertemplate="rank %{y} to rank %{x}: %{z} MiB<extra></extra>",
        )
    ranks = max(len(matrix) for matrix in matrices.values())
    for update in (made.update_xaxes, made.update_yaxes):
        update(dtick=1 if ranks <= 16 else None, constrain="domain")
    made.update_yaxes(autorange="reversed")
    made.update_layout(updatemenus=chooser([f"stage {stage}" for stage in matrices]))
    return made


def profile(run: RunFiles) -> go.Figure | None:
    """Draw the parts of a step on each rank."""
    ranks = run.profile.get("ranks")
    if not isinstance(ranks, list) or not all(isinstance(rank, dict) for rank in ranks):
        return None
    made = figure("ms a step", "rank", barmode="stack")
    for part in dict.fromkeys(name for rank in ranks for name in rank):
        made.add_bar(
            x=[1000 * (number(rank, part) or 0) for rank in ranks],
            y=list(range(len(ranks))),
            name=part.replace("_", "-"),
            orientation="h",
        )
    made.update_yaxes(dtick=1, autorange="reversed")
    return made if made.data else None
