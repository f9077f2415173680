"""Metrics of offloaded experts: bytes moved, and which clusters are behind with their updates, and for how long.

Shapes: L layers, G clusters.
"""

import torch
import torch.distributed as dist

from moe_dist.distributed.init import RankInfo
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine


def offload_figures(engine: DeepSpeedEngine, process: RankInfo) -> dict[str, int] | None:
    """Sum the figures of all ranks since the start (`docs/metrics.md`); None without offload. Collective."""
    optimizer = engine.training_state().offloaded
    if optimizer is None:
        return None
    tiers = optimizer.memory.tiers.figures()
    sums = {name: tiers[name] for name in ("bytes_in", "bytes_out")}
    sums |= {"updates": optimizer.updates, "deferred_updates": optimizer.deferred}
    sums["clusters_behind"] = sum(cluster.behind > 0 for cluster in optimizer.memory.clusters.values())
    extremes = {name: tiers[name] for name in ("budget_bytes", "peak_device_bytes")}
    extremes["longest_behind"] = optimizer.longest
    reduced: dict[str, int] = {}
    for figures, operation in ((extremes, dist.ReduceOp.MAX), (sums, dist.ReduceOp.SUM)):
        values = torch.tensor(list(figures.values()), device=process.device)
        dist.all_reduce(values, operation)
        reduced |= dict(zip(figures, values.tolist(), strict=True))
    return reduced


def updates_behind(engine: DeepSpeedEngine, process: RankInfo) -> list[list[int]] | None:
    """Return the number of deferred updates of each cluster [L, G]; None without offloaded clusters. Collective."""
    optimizer, context = engine.training_state().offloaded, engine.model.context
    if optimizer is None or not context.placements:
        return None
    behind_LG = torch.zeros(len(context.placements), context.placements[0].clusters, dtype=torch.int64)
    for (layer, local), cluster in optimizer.memory.clusters.items():
        held = context.placements[layer].clusters_of_block(context.mesh.at.cluster)
        behind_LG[layer, held[local]] = cluster.behind
    behind_LG = behind_LG.to(process.device)
    dist.all_reduce(behind_LG, dist.ReduceOp.MAX)  # replicas agree
    return [[int(behind) for behind in row] for row in behind_LG.tolist()]
