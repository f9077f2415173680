"""`moe-dist topology`: placement of ranks, clusters and experts on nodes, and the traffic between nodes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from moe_dist.cli.options import Config, Overrides, takes
from moe_dist.config import RunConfig, WorldShape, load_config, resolve_world
from moe_dist.console import wide_console
from moe_dist.launch.hostfile import Node
from moe_dist.launch.job import JobSize, Launcher, plan

if TYPE_CHECKING:
    from moe_dist.distributed.node_layout import Crossing

WHAT = {
    "stage_one": "stage one: tokens to their clusters",
    "cluster": "stage two: rows to their experts' shards",
    "expert_parallel": "tokens to their experts",
    "base_data": "gradients of bases",
    "expert_data": "gradients of experts",
    "tensor": "tensor parallelism: sequences gathered and scattered around attention",
    "context": "context parallelism: heads of attention",
    "tensor_data": "gradients of attention and embeddings",
    "pipeline": "hidden states between pipeline stages",
    "stage": "gradients of all else",
    "all": "gradients of all else",
}
OF_ATTENTION = ("tensor", "context", "tensor_data", "pipeline", "stage")
TRAFFIC = {  # of a kind of layer, by the way in which tokens are dispatched
    "two_stage": ("stage_one", "cluster", "base_data", "expert_data", "all"),
    "flat": ("expert_parallel", "expert_data", "all"),
    "none": ("all",),
}


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(topology)


@takes(size=JobSize)
def topology(
    config: Config,
    size: JobSize,
    overrides: Overrides = None,
) -> None:
    """Show which node, clusters and experts each rank has, and which traffic stays inside nodes."""
    # As under SLURM, machines need not be named.
    launcher = Launcher.SLURM if size.hostfile is None else Launcher.LOCAL
    job = plan(launcher, size, config, overrides or (), starts=False)
    resolved = load_config(config, overrides or ())
    shape = resolve_world(resolved, job.ranks)
    from moe_dist.distributed.node_layout import crossings, nodes_of_ranks

    node_of_rank, console = nodes_of_ranks([node.ranks for node in job.nodes]), wide_console()
    console.print(f"{job.ranks} ranks = {shape}, on {len(job.nodes)} node(s)\n", highlight=False)
    console.print(_map(resolved, shape, job.nodes, node_of_rank))
    shown = TRAFFIC[resolved.moe.layer_kind.dispatch] + OF_ATTENTION
    found = [(WHAT[name], entry) for entry in crossings(shape, node_of_rank) if (name := _name(entry)) in shown]
    console.print()
    console.print(_crossings(found))
    from moe_dist.dispatch.layout_advice import layout_advice

    if (advice := layout_advice(resolved, shape)) is not None:
        console.print(f"\nwarning: {advice}", highlight=False, soft_wrap=True)
    console.print(_verdict(resolved, shape, found, job.nodes), highlight=False, soft_wrap=True)


def _name(entry: "Crossing") -> str:
    return "all" if entry.kind is None else entry.kind.value


def _map(config: RunConfig, shape: WorldShape, nodes: Sequence[Node], node_of_rank: Sequence[int]) -> Table:
    from moe_dist.distributed.mesh import attention_coordinates, coordinates_of

    divided = shape.sequence_parts > 1
    of_attention = ("sequences", "context", "tensor") if divided else ()
    of_pipeline = ("stage",) if shape.pipeline > 1 else ()
    axes = (*of_pipeline, "data", "cluster", "shard", *of_attention)
    table = Table("node", "rank", *axes, "holds", box=None, pad_edge=False)
    before = None
    for rank, node in enumerate(node_of_rank):
        at = coordinates_of(shape, rank)
        name = nodes[node].host or str(node)
        stage = (rank // shape.stage_ranks,) if of_pipeline else ()
        in_attention = attention_coordinates(shape, rank) if divided else ()
        numbers = (rank, *stage, at.data, at.cluster, at.shard, *in_attention)
        held = _holds(config, shape, at.cluster, at.shard)
        table.add_row(name if node != before else "", *map(str, numbers), held)
        before = node
    return table


def _holds(config: RunConfig, shape: WorldShape, block: int, shard: int) -> str:
    """Return the clusters and experts of a rank at the start of a run; re-clustering may move them later."""
    moe = config.moe
    if not moe.layer_kind.routed:
        return "the whole layer"
    if not moe.layer_kind.clustered:
        each, place = moe.experts // (shape.cluster * shape.shard), block * shape.shard + shard
        return f"experts {_run(range(place * each, (place + 1) * each))}"
    from moe_dist.distributed.placement import ExpertPlacement

    placement = ExpertPlacement.contiguous(moe.experts, moe.clusters, shape)
    clusters = placement.clusters_of_block(block)
    experts = [expert for cluster in clusters for expert in placement.experts_of(cluster, shard)]
    return f"cluster{'s' if len(clusters) > 1 else ''} {_run(clusters)}: experts {_run(experts)}"


def _run(numbers: Sequence[int]) -> str:
    """Format numbers as ranges: 0-3, 8-11."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _crossings(found: list[tuple[str, "Crossing"]]) -> Table:
    table = Table(
        "\ntraffic", "groups\nof ranks", "groups\nacross nodes", "pairs\nacross nodes", box=None, pad_edge=False
    )
    for what, entry in found:
        groups = f"{entry.groups} of {entry.ranks}"
        share = f"{entry.pairs_between_nodes} of {entry.pairs}"
        alone = not entry.pairs  # groups of one rank, which send nothing
        table.add_row(what, *(("-",) * 3 if alone else (groups, str(entry.crossing or "none"), share)))
    return table


def _verdict(config: RunConfig, shape: WorldShape, found: list[tuple[str, "Crossing"]], nodes: Sequence[Node]) -> str:
    """Return the main finding: whether the traffic of each stage stays inside nodes."""
    if not config.moe.layer_kind.clustered:
        return ""
    stage_one, stage_two = (next(e for _, e in found if _name(e) == name) for name in ("stage_one", "cluster"))
    broken = stage_two.crossing
    if broken:
        per_node = ", ".join(sorted({str(node.ranks) for node in nodes}))
        return (
            f"\nwarning: {broken} cluster group(s) lie across nodes, so that stage two crosses them: make the ranks of "
            f"a node ({per_node}) a multiple of world.shard={shape.shard}"
        )
    inside = "\nEvery cluster group lies inside a node: stage two never leaves one"
    if not stage_one.crossing:
        return f"{inside}, nor does stage one." if len(nodes) > 1 else f"{inside}."
    return (
        f"{inside}. Stage one crosses nodes, in {stage_one.pairs_between_nodes} of {stage_one.pairs} pairs of ranks: "
        "one copy of a token for each of its clusters."
    )
