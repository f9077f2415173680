"""Final table of a run: the figures of `summary.json` for reading."""

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from moe_dist.metrics.summary import look_up

CURVE_ROWS = 10
MISSING = "-"


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
        console.print(_curve_table(curve, console.width))
    console.print(_figures_table(summary, folder, picture))


def _headline(summary: Mapping[str, Any], name: str | None) -> Panel:
    loss, perplexity = (look_up(summary, f"validation.{key}") for key in ("loss", "perplexity"))
    text = Text.assemble(
        ("validation loss ", "dim"),
        (_number(loss, ".4f"), "bold green"),
        ("   perplexity ", "dim"),
        (_number(perplexity, ",.2f"), "bold green"),
        ("   after ", "dim"),
        (_number(summary.get("tokens"), ",d"), "bold"),
        (" tokens, ", "dim"),
        (_number(summary.get("steps"), ",d"), "bold"),
        (" steps", "dim"),
    )
    return Panel(text, title=name, border_style="green", expand=False)


def _curve_table(curve: Sequence[Mapping[str, Any]], width: int) -> Table:
    points = [point for point in curve if point.get("loss") is not None]
    table = Table(box=None, padding=(0, 2), header_style="dim", title_justify="left")
    for name in ("tokens", "step", "val. loss", "perplexity"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    if not points:
        return table
    lowest, highest = (pick(point["loss"] for point in points) for pick in (min, max))
    span = (highest - lowest) or 1.0
    bar_width = max(10, min(40, width - 55))
    for point in _spread(points, CURVE_ROWS):
        loss = point["loss"]
        share = 0.08 + 0.92 * (loss - lowest) / span  # the best point keeps a short bar
        table.add_row(
            _number(point.get("tokens"), ",d"),
            _number(point.get("step"), ",d"),
            f"{loss:.4f}",
            f"{exp(loss):,.2f}" if loss < 50 else MISSING,
            Bar(1.0, 0.0, share, width=bar_width, color="green"),
        )
    return table


def _spread(points: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Return at most `most` points, evenly spaced, including the first and the last."""
    if len(points) <= most:
        return list(points)
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def _figures_table(summary: Mapping[str, Any], folder: Path | None, picture: Path | None) -> Table:
    def at(key: str) -> Any:
        return look_up(summary, key)

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row()
    table.add_row("ranks", _world(summary))
    table.add_row("speed", f"{_number(at('tokens_per_second'), ',.0f')} tokens/s")
    if (first := at("first_step_seconds")) is not None:
        table.add_row("time", f"{_phases(at('wall_seconds') or {})}; first step done after {first:.1f} s")
    for name, source in (at("data.sources") or {}).items():
        if (words := _source(source)) is not None:
            table.add_row(f"text {name}", words)
    if (scaling := at("loss_scale")) is not None:
        skipped = f"{scaling['skipped_steps']} steps skipped, whose gradients overflowed float16"
        table.add_row("loss scale", f"{scaling['scale']:g}; {skipped}")
    table.add_row("parameters", f"{_count(at('parameters.total'))} total")
    table.add_row("in experts", _experts(summary))
    if (stored := at("validation.loss_stored")) is not None:
        table.add_row("as stored", f"validation loss {_number(stored, '.4f')}; {_stored(summary)}")
    if at("teacher.after") is not None:
        table.add_row("teacher", _teacher(summary))
    if at("recluster.rounds"):
        table.add_row(
            "regrouping",
            f"{at('recluster.rounds')} rounds moved {at('recluster.moved_experts')} experts to other clusters: "
            f"{_bytes(at('recluster.bytes'))} between ranks in {_number(at('recluster.seconds'), '.1f')} s",
        )
    flat = at("all_to_all.flat_bytes_per_token_layer")
    table.add_row(
        "all-to-all",
        f"{_bytes(at('all_to_all.bytes_per_token_layer'))} per token and layer"
        f"{f' (flat routing: {_bytes(flat)})' if flat else ''}, "
        f"{_bytes(at('all_to_all.bytes'))} total, "
        f"{_bytes(at('all_to_all.bytes_inter_node'))} between nodes",
    )
    if others := _collectives(at("collectives") or {}):
        table.add_row("other traffic", others)
    table.add_row(
        "expert load",
        f"variance {_number(at('load.variance'), '.2e')}, cv² {_number(at('load.cv2'), '.4f')} (0: equal)",
    )
    table.add_row("peak memory", _memory(summary))
    if at("memory.offload") is not None:
        table.add_row("offload", _offload(summary))
    if folder is not None:
        table.add_row("files", Text(f"{folder}/", "bold"))
    if picture is not None:
        table.add_row("picture", Text(str(picture), "bold"))
    return table


def _phases(seconds: Mapping[str, float | None]) -> str:
    """Return the wall time of each phase of a run."""
    known = {phase: length for phase, length in seconds.items() if length is not None}
    return f"{sum(known.values()):.1f} s: " + ", ".join(f"{phase} {length:.1f}" for phase, length in known.items())


def _collectives(by_purpose: Mapping[str, Mapping[str, int]]) -> str:
    """Return the bytes of all ranks in a step beside the all-to-alls, by purpose; empty if there are none."""
    sent = {purpose: volume["bytes_per_step"] for purpose, volume in by_purpose.items() if volume["bytes_per_step"]}
    between = sum(volume["bytes_per_step_inter_node"] for volume in by_purpose.values())
    words = ", ".join(f"{purpose} {_bytes(size)}" for purpose, size in sent.items())
    return f"{words} a step; {_bytes(between)} of it between nodes" if sent else ""


def _source(source: Mapping[str, Any]) -> str | None:
    """Return the draws and the loss of a blend's source, and what packing made of it; None: nothing to tell."""
    parts = []
    if (loss := source.get("validation_loss")) is not None:
        drawn = f"{_number(source.get('tokens'), ',d')} tokens, {_number(source.get('epochs'), '.2f')} epochs"
        parts.append(f"validation loss {_number(loss, '.4f')}; {drawn}")
    if (padding := source.get("padding")) is not None:
        parts.append(f"padding {padding:.2%}, {_number(source.get('cut_documents'), '.1%')} of documents cut")
    return "; ".join(parts) or None


def _stored(summary: Mapping[str, Any]) -> str:
    """Return the size of quantized experts beside that of the experts in float32."""
    stored, own = look_up(summary, "stored.expert_bytes"), look_up(summary, "parameters.expert")
    residuals = _bytes(look_up(summary, "stored.residual_bytes"))
    return f"experts take {_bytes(stored)}, of that residuals {residuals}; in float32 {_bytes(own and 4 * own)}"


def _teacher(summary: Mapping[str, Any]) -> str:
    """Return the teacher's loss, and the divergence from it before and after training."""
    before, after = (look_up(summary, f"teacher.{when}") for when in ("before", "after"))
    text = f"validation loss {after['teacher_loss']:.4f}, divergence from it {after['divergence']:.4f}"
    if before is None:
        return text
    return f"{text}; before training: own loss {before['loss']:.4f}, divergence {before['divergence']:.4f}"


def _offload(summary: Mapping[str, Any]) -> str:
    """Return the part of the clusters that was on the device at most, and the bytes moved."""
    offload, whole = look_up(summary, "memory.offload"), look_up(summary, "memory.offloadable_bytes")
    return (
        f"at most {_bytes(offload['peak_device_bytes'])} of {_bytes(whole)} of a rank's clusters in memory; "
        f"{_bytes(offload['bytes_in'])} fetched, {_bytes(offload['bytes_out'])} evicted{_deferred(offload)}"
    )


def _deferred(offload: Mapping[str, Any]) -> str:
    """Return the share of deferred updates; nothing if there were none."""
    deferred, updates = offload.get("deferred_updates"), offload.get("updates")
    if not deferred or not updates:
        return ""
    return f"; {deferred / updates:.1%} of updates deferred, for up to {offload.get('longest_behind')} steps"


def _world(summary: Mapping[str, Any]) -> str:
    sizes = [look_up(summary, f"world.{axis}") for axis in ("data", "cluster", "shard")]
    if None in sizes:
        return MISSING
    data, cluster, shard = sizes
    tensor, context, stages = (look_up(summary, f"world.{axis}", 1) for axis in ("tensor", "context", "pipeline"))
    of_pipeline = f"pipeline {stages} x " if stages > 1 else ""
    parts = f"; attention: tensor {tensor} x context {context}" if tensor * context > 1 else ""
    ranks = stages * data * cluster * shard
    return f"{ranks} = {of_pipeline}data {data} x cluster {cluster} x shard {shard}{parts}"


def _experts(summary: Mapping[str, Any]) -> str:
    own, standard = (look_up(summary, f"parameters.{key}") for key in ("expert", "expert_standard"))
    text = f"{_count(own)}; standard experts would need {_count(standard)}"
    return f"{text} ({own / standard:.1%} of that)" if own is not None and standard else text


def _memory(summary: Mapping[str, Any]) -> str:
    by_rank = look_up(summary, "memory.peak_rss_bytes_by_rank") or []
    text = f"{_bytes(look_up(summary, 'memory.peak_rss_bytes'))} on the largest rank"
    if len(by_rank) > 1:
        text += f" (each: {', '.join(_bytes(value) for value in by_rank)})" if len(by_rank) <= 8 else ""
    if device := look_up(summary, "memory.peak_device_bytes"):
        text += f", {_bytes(device)} on its device"
    state, dense = (look_up(summary, f"memory.{key}") for key in ("device_bytes", "dense_bytes"))
    if state and dense:
        text += f"; of that weights, gradients and training state {_bytes(state)}, of a dense model {_bytes(dense)}"
    return text


def _number(value: Any, form: str) -> str:
    if value is None:
        return MISSING
    return format(round(value) if form.endswith("d") else value, form)


def _count(value: Any) -> str:
    if value is None:
        return MISSING
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.2f}{unit}"
    return str(value)


def _bytes(value: Any) -> str:
    if value is None:
        return MISSING
    size = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
