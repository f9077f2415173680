"""Picture of a run, `run.png` in its folder: loss, balance, re-clustering, bytes, parameters and memory in one view."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.metrics.summary import look_up

PICTURE = "run.png"
BLUE, GRAY, RED = "#2a6fb0", "#b8c0c8", "#c8553d"


def write_picture(folder: Path, summary: Mapping[str, Any]) -> Path | None:
    """Draw the figures of a run folder; return the file, or None if it cannot be drawn or written."""
    try:
        _draw(folder, summary).savefig(folder / PICTURE, dpi=110)
    except (ImportError, OSError, json.JSONDecodeError):  # no matplotlib; a full disk, and a line that it cut
        return None
    return folder / PICTURE


def _draw(folder: Path, summary: Mapping[str, Any]) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    steps = _lines(folder / "metrics.jsonl")
    events = _lines(folder / "events.jsonl")
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, 3)
    figure.suptitle(f"{summary.get('name', folder.name)}: {_line(summary)}", fontsize=11)
    _loss(axes[0, 0], steps, events)
    _balance(axes[0, 1], steps)
    _moves(axes[0, 2], events)
    _pair(axes[1, 0], "all-to-all, bytes per token and layer", "flat routing", "this run", *_of(summary, "all_to_all"))
    _pair(axes[1, 1], "parameters of experts, million", "standard", "this run", *_of(summary, "parameters"))
    _pair(axes[1, 2], "training state of rank 0, MiB", "dense model", "on the device", *_of(summary, "memory"))
    return figure


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the whole records of a file of JSON lines; none if it cannot be read."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _line(summary: Mapping[str, Any]) -> str:
    loss, speed = look_up(summary, "validation.loss"), look_up(summary, "tokens_per_second")
    return f"validation loss {loss:.3f}, {speed:,.0f} tokens/s, {summary['steps']:,} steps"


def _of(summary: Mapping[str, Any], part: str) -> tuple[float | None, float | None]:
    """Return the baseline's and this run's figure of one comparison; None where there is none."""
    if part == "all_to_all":
        return look_up(summary, "all_to_all.flat_bytes_per_token_layer"), look_up(
            summary, "all_to_all.bytes_per_token_layer"
        )
    if part == "parameters":
        values = (look_up(summary, f"parameters.{key}") for key in ("expert_standard", "expert"))
        scale = 1e6
    else:
        values = (look_up(summary, f"memory.{key}") for key in ("dense_bytes", "device_bytes"))
        scale = 2**20
    baseline, own = (None if value is None else value / scale for value in values)
    return baseline, own


def _loss(axes: Any, steps: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]) -> None:
    trained = [(line["step"], line["train"]["loss"]) for line in steps if "train" in line]
    held_out = [(line["step"], line["validation"]["loss"]) for line in steps if "validation" in line]
    axes.plot(*zip(*trained, strict=True), color=GRAY, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color=BLUE, label="validation")
    for event in events:
        if event["event"] == "recluster":
            axes.axvline(event["step"], color=RED, linewidth=0.8, linestyle=":")
    axes.set(title="loss, nats per token (dotted: re-clustering)", xlabel="step")
    axes.legend(frameon=False)


def _balance(axes: Any, steps: Sequence[Mapping[str, Any]]) -> None:
    points = [(line["step"], line["load"]["cv2"]) for line in steps if "load" in line]
    if points:
        axes.plot(*zip(*points, strict=True), color=BLUE)
        axes.set_yscale("log")
    axes.set(title="load imbalance of the experts, cv²", xlabel="step")


def _moves(axes: Any, events: Sequence[Mapping[str, Any]]) -> None:
    rounds = [event for event in events if event["event"] == "recluster"]
    labels = [str(event["step"]) for event in rounds]
    axes.bar(labels, [event["moved_experts"] for event in rounds], color=BLUE, label="moved")
    rejected = [event["dropped_experts"] for event in rounds]
    axes.bar(labels, rejected, bottom=[event["moved_experts"] for event in rounds], color=GRAY, label="rejected")
    axes.set(title="experts that change clusters", xlabel="after step")
    axes.margins(y=0.1)
    if rounds:
        axes.legend(frameon=False)


def _pair(axes: Any, title: str, other: str, own: str, baseline: float | None, value: float | None) -> None:
    """Draw two bars, with their values; nothing where one of them is missing."""
    axes.set_title(title)
    axes.set_xticks([])
    if baseline is None or value is None:
        axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
        return
    bars = axes.barh([own, other], [value, baseline], color=[BLUE, GRAY])
    axes.bar_label(bars, fmt=lambda number: f" {number:,.0f}" if number >= 100 else f" {number:.3g}", padding=2)
    axes.set_xlim(0, 1.2 * max(baseline, value, 1e-9))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
