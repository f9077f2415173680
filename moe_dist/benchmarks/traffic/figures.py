"""Figures of a traffic measurement, summed over all ranks from their ledgers and routing traces."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.dispatch.routing_trace import RoutingTrace
from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage
from moe_dist.dispatch.traffic_model import hop_costs
from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.links import LinkKind
from moe_dist.training.summary_metrics import traffic_matrices
from moe_dist.training.trainer import Trainer

BYTES, MESSAGES = 0, 1
PASSES = 4  # dispatch and combine, forward and backward


def gather_figures(run: Trainer, observed: RoutingTrace, steps: int) -> dict[str, Any]:
    """Return the figures of the `steps` steps in the ledger (docs/metrics.md); collective."""
    layers, tokens = run.config.moe_layers, steps * run.logger.tokens_per_step
    ledger = run.model.context.ledger
    axes: tuple[Sequence[Any], ...] = (range(layers), list(Stage), list(Payload), list(Direction), list(LinkKind))
    mine = torch.zeros(*(len(axis) for axis in axes), 2, dtype=torch.int64)
    for key, volume in ledger.sent.items():
        kind = ledger.links.kind(key.peer)
        place = (key.layer, key.stage, key.payload, key.direction, kind)
        index = tuple(list(axis).index(value) for axis, value in zip(axes, place, strict=True))
        mine[index] += torch.tensor([volume.bytes, volume.messages])
    dist.all_reduce(mine := mine.to(run.process.device))
    sent = mine.cpu()
    token_layers = tokens * layers
    by_axis = {
        name: {str(value): int(sent.select(axis, index)[..., BYTES].sum()) for index, value in enumerate(axes[axis])}
        for axis, name in ((1, "stage"), (2, "payload"), (3, "direction"), (4, "link"))
    }
    return {
        "kind": run.config.moe.kind,
        "world": vars(run.shape),
        "steps": steps,
        "tokens": tokens,
        "layers": layers,
        "bytes": int(sent[..., BYTES].sum()),
        "bytes_per_token_layer": float(sent[..., BYTES].sum() / token_layers),
        "messages_per_step": float(sent[..., MESSAGES].sum() / steps),
        "bytes_by": by_axis,
        "bytes_by_layer": [int(sent[layer, ..., BYTES].sum()) for layer in range(layers)],
        "lower_bound": _lower_bound(run, observed, token_layers),
        **traffic_matrices(ledger, run.process),
    }


def _lower_bound(run: Trainer, observed: RoutingTrace, token_layers: int) -> dict[str, Any]:
    """Return the minimum of bytes of hidden vectors for the same routing.

    One vector of each token to each other rank that holds one of its experts, and one back, in both passes; between
    nodes, one to each other node with one of its experts.
    """
    vector = {hop.stage: hop.hidden for hop in hop_costs(run.config.model, run.config.moe, run.shape)}
    mine = torch.zeros(2, dtype=torch.int64)
    for (_, stage), needs in observed.needs.items():
        if stage in vector:
            elsewhere = [i for i, rank in enumerate(needs.group) if rank != observed.rank]
            ranks = int(needs.needed_P[elsewhere].sum())
            mine += PASSES * vector[stage] * torch.tensor([ranks, needs.nodes])
    dist.all_reduce(mine := mine.to(run.process.device))
    total, inter_node = mine.tolist()
    return {
        "bytes": total,
        "bytes_inter_node": inter_node,
        "bytes_per_token_layer": total / token_layers,
    }


def gather_seconds(mine: list[float], process: RankInfo) -> list[list[float]]:
    """Return every rank's row; collective."""
    row = torch.tensor(mine, device=process.device)
    rows = [torch.empty_like(row) for _ in range(process.ranks)]
    dist.all_gather(rows, row)
    return [each.tolist() for each in rows]
