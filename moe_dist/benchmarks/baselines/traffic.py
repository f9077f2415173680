"""Traffic of DeepSpeed's and Megatron-core's own MoE layers, counted by the collectives that they issue."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from moe_dist.benchmarks.baselines.deepspeed_moe import DeepSpeedMoE
from moe_dist.benchmarks.baselines.megatron_moe import MegatronMoE, stand_ins
from moe_dist.benchmarks.collective_timer import CollectiveTimer
from moe_dist.config import RunConfig, resolve_batch
from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.links import LinkKind, Links
from moe_dist.errors import ConfigError

PEERS: dict[str, tuple[Callable[[RunConfig, int], nn.Module], Callable[[], AbstractContextManager[None]]]] = {
    "deepspeed": (DeepSpeedMoE, nullcontext),
    "megatron": (MegatronMoE, stand_ins),
}
"""Factory of the layer for a number of ranks, and context manager of its passes, by name."""


def measure_peer(
    name: str, config: RunConfig, process: RankInfo, timer: CollectiveTimer, steps: int, warmup: int
) -> dict[str, Any]:
    """Measure one layer, forward and backward, on random tokens in the type of `train.precision`; collective.

    Dropless: DeepSpeed's capacity is that of the fullest expert of any rank, and every expert's chunk is padded to it;
    Megatron-core's all-to-all has variable splits, without padding. The routing is that of an untrained gate.
    `layer_seconds` is the time of this one layer, with the timer on.

    Raises:
        ConfigError: the ranks do not divide the experts.
    """
    if config.moe.experts % process.ranks:
        experts = f"moe.experts={config.moe.experts}"
        raise ConfigError(f"--kind {name}: {experts} cannot be divided over {process.ranks} ranks")
    batch, dtype = resolve_batch(config, process.ranks), getattr(torch, config.train.precision)
    make, setting = PEERS[name]
    layer = make(config, process.ranks).to(process.device, dtype)
    shape = (batch.micro * config.model.sequence_length, config.model.hidden_size)
    draw, seconds = torch.Generator().manual_seed(config.seed + process.rank), []
    for step in range(warmup + steps):
        if step == warmup:
            timer.clear()
            timer.active = True
        x_TD = torch.randn(shape, generator=draw).to(process.device, dtype).requires_grad_()
        started = time.perf_counter()
        with setting():
            layer(x_TD).square().mean().backward()
        seconds.append(time.perf_counter() - started)
    timer.active = False
    return _figures(name, process, timer, steps, shape[0], float(np.median(seconds[warmup:])))


def _figures(
    name: str, process: RankInfo, timer: CollectiveTimer, steps: int, tokens: int, seconds: float
) -> dict[str, Any]:
    """Return those keys of `gather_figures` that can be measured from outside."""
    links = Links.discover(process.device)
    mine = torch.zeros(2, process.ranks, dtype=torch.int64)
    for peer, size in timer.bytes_to.items():
        mine[:, peer] = torch.tensor([size, timer.messages_to[peer]])
    rows = [torch.empty_like(mine) for _ in range(process.ranks)]
    dist.all_gather(rows, mine.to(process.device))
    sent, messages = torch.stack(rows, dim=1)
    node_R = torch.tensor(links.node_of_rank)
    inter = int(sent[node_R[:, None] != node_R].sum())
    all_tokens = steps * tokens * process.ranks
    return {
        "kind": name,
        "steps": steps,
        "tokens": all_tokens,
        "layers": 1,
        "bytes": int(sent.sum()),
        "bytes_per_token_layer": int(sent.sum()) / all_tokens,
        "messages_per_step": int(messages.sum()) / steps,
        "bytes_by": {"link": {LinkKind.INTRA_NODE: int(sent.sum()) - inter, LinkKind.INTER_NODE: inter}},
        "layer_seconds": seconds,
        "node_of_rank": list(links.node_of_rank),
        "stages": {name: {"bytes": sent.tolist(), "messages": messages.tolist()}},
    }
