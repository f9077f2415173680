"""Plot of time and weights of layers against the number of experts."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moe_dist.benchmarks.growth.bench import GrowthResult


def plot_growth(result: GrowthResult, target: Path) -> None:
    """Write a PNG: time over dense with its quartiles on the left, bytes of weights on the right, both against E."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    time, weights = figure.subplots(1, 2)
    for name in result.cases[0].layers:
        cases = [case for case in result.cases if name in case.layers]
        experts = [case.experts for case in cases]
        spreads = [case.layers[name].over_dense for case in cases]
        middle = [spread.median for spread in spreads]
        below = [spread.median - spread.lower for spread in spreads]
        above = [spread.upper - spread.median for spread in spreads]
        time.errorbar(experts, middle, yerr=(below, above), marker="o", capsize=3, label=name)
        weights.plot(experts, [case.layers[name].weight_bytes / 1e6 for case in cases], marker="o", label=name)
    for axes, label in ((time, "time of forward + backward over dense"), (weights, "weights, MB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("experts")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
    time.legend()
    figure.savefig(target, dpi=120)
