"""Terminal tables of plans and simulations, and their figures for JSON."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_dist.console import titled_table
from moe_dist.simulator.calibration import DEVICE_CONSTANTS, Calibration
from moe_dist.simulator.memory import Memory
from moe_dist.simulator.planner import GIB, Option, PlannerResult
from moe_dist.simulator.step_time import StepTime

SHOWN = 8
AXES = ("pipeline", "chunks", "tensor", "context")
"""Axes that have a column where a shown layout divides them."""


def render_plan(found: PlannerResult, console: Console, subject: str) -> None:
    """Print the fastest layouts, the memory of the best by kind, and the recommendation with its reason.

    Args:
        subject: what is planned: model, batch and machine.
    """
    console.print(f"{subject}\n", markup=False, highlight=False, soft_wrap=True)
    table = titled_table("layouts that fit, fastest first (predicted)", padding=0)
    shown = [option for option in found.options[:SHOWN] if option.time is not None]
    divided = [axis for axis in AXES if any(getattr(option.layout.shape, axis) > 1 for option in shown)]
    axes = (*divided, "data", "cluster", "shard", "ZeRO", "micro", "recompute")
    for name in (*axes, "GiB", "ms", "MFU", "tokens/s", "B/token/layer", "of it between nodes"):
        table.add_column(name, justify="right")
    for option in shown:
        if option.time is not None:
            sizes = [str(getattr(option.layout.shape, axis)) for axis in divided]
            table.add_row(*sizes, *_cells(option, option.time))
    console.print(table)
    console.print(_memory(found.best.memory, found.limit))
    words = {"markup": False, "highlight": False, "soft_wrap": True}
    console.print(f"recommended: {found.best.layout.overrides}", **words)  # type: ignore[arg-type]
    console.print(f"because it is {found.reason}", **words)  # type: ignore[arg-type]


def _cells(option: Option, time: StepTime) -> list[str]:
    layout, shape = option.layout, option.layout.shape
    numbers = [shape.data, shape.cluster, shape.shard, layout.zero_stage, layout.batch.micro]
    return [
        *map(str, numbers),
        "yes" if layout.checkpointing else "no",
        f"{option.memory.total / GIB:.1f}",
        f"{1000 * time.seconds:,.{0 if time.seconds > 0.1 else 2}f}",
        f"{time.model_flops_utilisation:.1%}",
        f"{time.tokens_per_second:,.0f}",
        f"{time.bytes_per_token_layer:,.0f}",
        f"{time.inter_node_bytes_per_token_layer:,.0f}",
    ]


def _memory(memory: Memory, limit: float) -> Table:
    table = titled_table(f"memory of a GPU with the first, of {limit / GIB:.1f} GiB")
    table.add_column("")
    table.add_column("GiB", justify="right")
    for part in fields(memory):
        table.add_row(part.name.replace("_", " "), f"{getattr(memory, part.name) / GIB:.2f}")
    table.add_row("in all", f"{memory.total / GIB:.2f}")
    return table


def render_times(times: Mapping[str, StepTime], console: Console) -> None:
    """Print step time by part, one column for each routing strategy."""
    table = titled_table("predicted step, ms")
    table.add_column("")
    for name in times:
        table.add_column(name, justify="right", no_wrap=True)
    for part in next(iter(times.values())).parts:
        if any(time.parts[part] for time in times.values()):
            table.add_row(part, *(_milliseconds(time.parts[part]) for time in times.values()))
    table.add_section()
    table.add_row("step", *(_milliseconds(time.seconds) for time in times.values()))
    table.add_row("M tokens/s", *(f"{time.tokens_per_second / 1e6:,.2f}" for time in times.values()))
    table.add_row("MFU", *(f"{time.model_flops_utilisation:.1%}" for time in times.values()))
    table.add_row("B/token/layer", *(f"{time.bytes_per_token_layer:,.0f}" for time in times.values()))
    table.add_row("  between nodes", *(f"{time.inter_node_bytes_per_token_layer:,.0f}" for time in times.values()))
    console.print(table)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.{1 if seconds >= 0.01 else 2}f}"


def render_calibration(found: Calibration, console: Console) -> None:
    """Print every case, measured and predicted, the mean errors, and the constants."""
    table = titled_table("a step, ms: median of those timed, smallest to largest")
    table.add_column("case")
    for name in ("measured", "spread", "predicted", "error", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.predictions:
        measured = one.measured
        table.add_row(
            measured.case.run.name.replace("-traffic-", " "),
            f"{1000 * measured.median:,.0f}",
            f"{1000 * min(measured.seconds):,.0f}-{1000 * max(measured.seconds):,.0f}",
            f"{1000 * one.time.seconds:,.0f}",
            f"{one.error:+.1%}",
            "held out" if measured.case.held_out else "fitted",
        )
    console.print(table)
    words = {"markup": False, "highlight": False, "soft_wrap": True}
    for name, held_out in (("all cases", None), ("those fitted", False), ("those held out", True)):
        if (error := found.mean_error(held_out)) is not None:
            console.print(f"mean absolute error of {name}: {error:.1%}", **words)  # type: ignore[arg-type]
    machine = found.machine
    fitted = [f"{name} {getattr(machine.device, name):.3g}" for name in DEVICE_CONSTANTS]
    text = ", ".join([*fitted, f"network_latency {machine.network_latency:.3g}"])
    console.print(f"fitted: {text}", **words)  # type: ignore[arg-type]


def time_to_dict(time: StepTime) -> dict[str, Any]:
    """Return the figures of a step for `--json`."""
    return {
        "seconds": time.seconds,
        "parts": time.parts,
        "tokens_per_second": time.tokens_per_second,
        "model_flops_utilisation": time.model_flops_utilisation,
        "bytes_per_token_layer": time.bytes_per_token_layer,
        "inter_node_bytes_per_token_layer": time.inter_node_bytes_per_token_layer,
    }


def plan_to_dict(found: PlannerResult) -> dict[str, Any]:
    """Return all candidates for `--json`, the recommended one first."""
    return {
        "reason": found.reason,
        "limit_bytes": found.limit,
        "options": [
            {
                "overrides": option.layout.overrides,
                "world": vars(option.layout.shape),
                "fits": option.fits,
                "memory": {**asdict(option.memory), "total": option.memory.total},
                "time": None if option.time is None else time_to_dict(option.time),
            }
            for option in found.options
        ],
    }
