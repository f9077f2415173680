"""`moe-dist plan` and `moe-dist simulate`: predictions for other machines."""

import math
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.options import Config, Json, Overrides
from moe_dist.config import load_config
from moe_dist.console import wide_console
from moe_dist.metrics import write_json


def _require_finite(value: float) -> float:
    """Return a number, or reject infinity and NaN, which would be printed as advice."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


Nodes = Annotated[int, typer.Option(min=1, help="Machines.")]
PerNode = Annotated[int, typer.Option(min=1, help="GPUs in each.")]
Gpu = Annotated[str, typer.Option(help="v100, a100, h100, h200, b200 or mi300x.")]
Rails = Annotated[int | None, typer.Option(min=1, help="Network interfaces of a node; default: one for each GPU.")]
PodNodes = Annotated[int | None, typer.Option(min=1, help="Nodes below one leaf switch; default: at most 32.")]
Oversubscription = Annotated[
    float,
    typer.Option(min=1.0, callback=_require_finite, help="Oversubscription of the spine: downlinks over uplinks."),
]
Skew = Annotated[
    float, typer.Option(min=0.0, max=20.0, callback=_require_finite, help="The i-th expert's popularity is 1 / i^skew.")
]
Calibration = Annotated[
    Path | None, typer.Option("--calibration", help="Machine file of `moe-dist calibrate`; instead of --gpu.")
]
Vocabulary = Annotated[int | None, typer.Option(min=1, help="Pieces; default: tokenizer.vocab_size.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(plan)
    app.command()(simulate)


def plan(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: PerNode = 8,
    gpu: Gpu = "h100",
    calibration: Calibration = None,
    rails: Rails = None,
    pod_nodes: PodNodes = None,
    oversubscription: Oversubscription = 1.0,
    skew: Skew = 0.2,
    vocabulary: Vocabulary = None,
    json_file: Json = None,
) -> None:
    """Predict memory, traffic and step time of every possible layout, and recommend one."""
    loaded = load_config(config, overrides or ())
    from moe_dist.simulator import planner
    from moe_dist.simulator import tables as view

    fabric = _machine(gpu, calibration).fabric(nodes, gpus_per_node, rails, pod_nodes, oversubscription)
    found = planner.plan(loaded, fabric, vocabulary or loaded.tokenizer.vocab_size, skew)
    model, batch = loaded.model, loaded.train.global_batch_size
    subject = (
        f"{loaded.name}: {model.layers} layers of {model.hidden_size}, {loaded.moe.layer_kind.describe(loaded.moe)}; "
        f"{batch} sequences of {model.sequence_length} tokens a step, on {nodes} x {gpus_per_node} {fabric.device.name}"
    )
    view.render_plan(found, wide_console(), subject)
    if json_file is not None:
        write_json(Path(json_file), view.plan_to_dict(found))


def simulate(
    config: Config,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: PerNode = 8,
    gpu: Gpu = "h100",
    calibration: Calibration = None,
    rails: Rails = None,
    pod_nodes: PodNodes = None,
    oversubscription: Oversubscription = 1.0,
    skew: Skew = 0.2,
    trace: Annotated[Path | None, typer.Option(help="A run folder: its experts' loads instead of --skew.")] = None,
    node_limit: Annotated[int, typer.Option(min=1, help="Limit of the nodes of a token's experts (node-limited).")] = 4,
    recluster_every: Annotated[int, typer.Option(min=1, help="Steps between re-clusterings.")] = 100,
    resident: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, callback=_require_finite, help="Share of clusters kept on the GPU (offload)."),
    ] = 0.5,
    overlap: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=_require_finite, help="Share of the all-to-all that is hidden.")
    ] = 0.0,
    vocabulary: Vocabulary = None,
    json_file: Json = None,
) -> None:
    """Compare flat, node-limited and two-stage routing on a large machine, with re-clustering and offload."""
    loaded = load_config(config, overrides or ())
    from moe_dist.simulator import tables as view
    from moe_dist.simulator.simulate import compare

    times = compare(
        loaded,
        _machine(gpu, calibration).fabric(nodes, gpus_per_node, rails, pod_nodes, oversubscription),
        vocabulary or loaded.tokenizer.vocab_size,
        skew=skew,
        trace=trace,
        most_nodes=node_limit,
        recluster_every=recluster_every,
        resident=resident,
        overlap=overlap,
    )
    view.render_times(times, wide_console())
    if json_file is not None:
        write_json(Path(json_file), {name: view.time_to_dict(time) for name, time in times.items()})


def _machine(gpu: str, calibration: Path | None):  # type: ignore[no-untyped-def]
    from moe_dist.simulator.hardware import device_named
    from moe_dist.simulator.machine import Machine, read_section

    if calibration is not None:
        return read_section(calibration, Machine, "--calibration")
    return Machine(device=device_named(gpu))
