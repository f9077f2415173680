"""Metrics of a whole run for its summary, gathered from all ranks."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.dispatch.traffic_ledger import Direction, Payload, Stage, TrafficLedger
from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.links import LinkKind, Links
from moe_dist.engine.deepspeed_engine import DeepSpeedEngine
from moe_dist.engine.optimizer_state import MASTER
from moe_dist.metrics import peak_rss_bytes, rss_bytes


def all_to_all_totals(ledger: TrafficLedger, tokens: int, moe_layers: int, process: RankInfo) -> dict[str, Any]:
    """Sum bytes and messages of the training's all-to-alls over all ranks, without those to itself; collective."""
    parts = [(link, payload, way) for link in LinkKind for payload in Payload for way in Direction]
    mine = [ledger.total(link, payload, way) for link, payload, way in parts]
    sent = torch.tensor([[volume.bytes, volume.messages] for volume in mine], device=process.device)
    dist.all_reduce(sent)
    volumes = dict(zip(parts, sent.tolist(), strict=True))

    def total(index: int, wanted: object = None) -> int:
        return sum(volume[index] for key, volume in volumes.items() if wanted is None or wanted in key)

    token_layers = max(1, tokens * moe_layers)
    return {
        "bytes": total(0),
        "bytes_inter_node": total(0, LinkKind.INTER_NODE),
        "bytes_per_token_layer": total(0) / token_layers,
        "hidden_bytes_per_token_layer": total(0, Payload.HIDDEN) / token_layers,
        "messages": total(1),
        "bytes_by_payload": {payload.value: total(0, payload) for payload in Payload},
        "bytes_by_direction": {way.value: total(0, way) for way in Direction},
    }


def collective_totals(engine: DeepSpeedEngine, links: Links) -> dict[str, dict[str, int]]:
    """Return the bytes that all ranks send in a step beside the all-to-alls, by purpose; collective."""
    sent = engine.collective_bytes()
    mine = [
        [sum(to_rank.values()), sum(size for rank, size in to_rank.items() if links.kind(rank) is LinkKind.INTER_NODE)]
        for to_rank in sent.values()
    ]
    totals = torch.tensor(mine, dtype=torch.float64, device=engine.process.device)
    dist.all_reduce(totals)
    return {
        purpose: {"bytes_per_step": round(whole), "bytes_per_step_inter_node": round(between)}
        for purpose, (whole, between) in zip(sent, totals.tolist(), strict=True)
    }


MATRIX_RANKS = 512
"""Largest number of ranks for which traffic matrices are written; beyond it they would be larger than a model."""


def traffic_matrices(ledger: TrafficLedger, process: RankInfo) -> dict[str, Any]:
    """Gather bytes and messages from each rank (row) to each rank (column) by stage, and each rank's node; collective.

    There are no stages for more than `MATRIX_RANKS` ranks.
    """
    if process.ranks > MATRIX_RANKS:
        return {"node_of_rank": list(ledger.links.node_of_rank), "stages": {}}
    mine = torch.zeros(len(Stage), 2, process.ranks, dtype=torch.int64)
    for key, volume in ledger.sent.items():
        mine[list(Stage).index(key.stage), :, key.peer] += torch.tensor([volume.bytes, volume.messages])
    mine = mine.to(process.device)
    rows = [torch.empty_like(mine) for _ in range(process.ranks)]
    dist.all_gather(rows, mine)
    stages = zip(Stage, torch.stack(rows, dim=2).tolist(), strict=True)  # [stage][bytes, messages][source][peer]
    return {
        "node_of_rank": list(ledger.links.node_of_rank),
        "stages": {
            stage.value: {"bytes": sent, "messages": messages}
            for stage, (sent, messages) in stages
            if any(map(any, messages))
        },
    }


def memory_now(process: RankInfo) -> dict[str, int]:
    """Return the current largest and smallest memory use of any rank, bytes; collective.

    For an accelerator only torch's allocations count; 0 on a CPU.
    """
    device = 0
    if process.device.type != "cpu":
        device = torch.get_device_module(process.device).memory_allocated()
    mine = rss_bytes()
    extremes = torch.tensor([mine, -mine, device], device=process.device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    largest, smallest, device = extremes.tolist()
    return {"rss_bytes_max": largest, "rss_bytes_min": -smallest, "device_bytes_max": device}


def model_bytes(engine: DeepSpeedEngine) -> tuple[int, int]:
    """Return the bytes of this rank's weights, gradients and training state, and those of them that are offloaded."""
    state, held, away = engine.training_state(), 0, 0
    for parameter in engine.model.parameters():
        if not state.is_offloaded(parameter):
            held += parameter.numel() * parameter.element_size() + state.bytes_of(parameter)  # gradient and weight
            fragment = state.fragment(parameter)
            tensors = {} if fragment is None else fragment.tensors
            masters = state.has_separate_master(parameter)
            held += sum(t.nbytes for name, t in tensors.items() if name != MASTER or masters)
    if state.offloaded is not None:
        clusters = state.offloaded.memory.clusters.values()
        away = sum(size.bytes for cluster in clusters for size in cluster.sizes().values())
    return held + away, away


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory use so far, bytes."""

    rss_by_rank: list[int]
    device: int
    """Peak of torch's allocations on an accelerator, the largest over ranks; 0 on a CPU."""


def peak_memory(process: RankInfo) -> PeakMemory:
    """Gather every rank's peaks; collective."""
    device_peak = 0
    if process.device.type != "cpu":
        device_peak = torch.get_device_module(process.device).max_memory_allocated()
    mine = torch.tensor([peak_rss_bytes(), device_peak], device=process.device)
    peaks = [torch.empty_like(mine) for _ in range(process.ranks)]
    dist.all_gather(peaks, mine)
    return PeakMemory([int(peak[0]) for peak in peaks], max(int(peak[1]) for peak in peaks))
