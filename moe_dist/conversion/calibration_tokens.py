"""Calibration tokens of every expert, captured in the model's forward pass.

Shapes: P rows sorted by local expert, A rows at a shard, L rows of one expert, D hidden, K chosen experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.distributed.mesh import GroupKind, RankGroup
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.standard_moe import StandardMoE

LARGEST_SAMPLE = 4096
"""Limit of the tokens kept per expert; more would not change second moments much."""

LayerTokens = dict[int, Tensor]
"""Tokens x_LD of each local expert by its number, float32."""


@dataclass(frozen=True)
class _TokenHook:
    """Hook on a module that receives the tokens of some experts, and the split of its inputs among them."""

    module: nn.Module
    experts: tuple[int, ...]
    divide: Callable[..., Sequence[Tensor]]


def standard_layers(model: LanguageModel) -> list[StandardMoE]:
    """Return the layers of standard experts, in order."""
    return [module for module in model.modules() if isinstance(module, StandardMoE)]


@torch.no_grad()
def mean_loss(model: LanguageModel, batches_BS: Sequence[Tensor]) -> float:
    """Return the mean loss over all ranks' micro-batches, whose number is the same on every rank; collective."""
    with model.evaluating():
        losses = torch.stack([model(batch_BS).double() for batch_BS in batches_BS])
    mean = losses.mean()
    dist.all_reduce(mean)
    return float(mean) / model.context.mesh.shape.stage_ranks


def sample_tokens(model: LanguageModel, batches_BS: Sequence[Tensor]) -> tuple[list[LayerTokens], float]:
    """Return each local expert's tokens on some batches, by layer, and the mean loss over all ranks; collective.

    Replicas of an expert share their tokens, so that they stay equal.

    Args:
        batches_BS: this rank's micro-batches, the same number on every rank.
    """
    mesh = model.context.mesh
    hooks = [_standard_hooks(layer) for layer in standard_layers(model)]
    hooks += [_clustered_hooks(layer) for layer in model.clustered_layers()]
    captured: list[dict[int, list[Tensor]]] = [{e: [] for hook in layer for e in hook.experts} for layer in hooks]
    with ExitStack() as stack:
        for layer, rows in zip(hooks, captured, strict=True):
            for hook in layer:
                stack.enter_context(_capture(hook, rows))
        loss = mean_loss(model, batches_BS)
    replicas, nothing = mesh.group(GroupKind.EXPERT_DATA), torch.zeros(0, model.config.model.hidden_size)
    device = batches_BS[0].device
    tokens = [
        {e: _shared(torch.cat([nothing.to(device), *rows])[:LARGEST_SAMPLE], replicas) for e, rows in layer.items()}
        for layer in captured
    ]
    return tokens, loss


@contextmanager
def captured_tokens(layer: StandardMoE) -> Iterator[LayerTokens]:
    """Yield a dict that holds the tokens of each local expert once the block has ended."""
    (hook,) = _standard_hooks(layer)
    rows: dict[int, list[Tensor]] = {expert: [] for expert in hook.experts}
    tokens: LayerTokens = {}
    nothing = layer.router.weight_ED.new_zeros(0, layer.router.weight_ED.shape[1])
    with _capture(hook, rows):
        yield tokens
    tokens |= {expert: torch.cat([nothing.float(), *found])[:LARGEST_SAMPLE] for expert, found in rows.items()}


def _standard_hooks(layer: StandardMoE) -> list[_TokenHook]:
    first, local = layer.first_expert, len(layer.experts.w_in)

    def divide(x_PD: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x_PD, list(counts))

    return [_TokenHook(layer.experts, tuple(range(first, first + local)), divide)]


def _clustered_hooks(layer: ClusteredMoE) -> list[_TokenHook]:
    at, placement = layer.context.mesh.at, layer.placement
    hooks = []
    for cluster, part in zip(placement.clusters_of_block(at.cluster), layer.clusters, strict=True):
        experts = placement.experts_of(cluster, at.shard)

        def divide(x_AD: Tensor, slot_AK: Tensor, _: Tensor, slots: int = len(experts)) -> Sequence[Tensor]:
            return [x_AD[(slot_AK == slot).any(1)] for slot in range(slots)]

        hooks.append(_TokenHook(part, experts, divide))
    return hooks


@contextmanager
def _capture(hook: _TokenHook, captured: dict[int, list[Tensor]]) -> Iterator[None]:
    def capture(_: nn.Module, inputs: Any) -> None:
        for expert, x_LD in zip(hook.experts, hook.divide(*inputs), strict=True):
            if sum(map(len, captured[expert])) < LARGEST_SAMPLE:
                captured[expert].append(x_LD.float().clone())

    handle = hook.module.register_forward_pre_hook(capture)
    try:
        yield
    finally:
        handle.remove()


def _shared(x_LD: Tensor, replicas: RankGroup) -> Tensor:
    """Gather the rows of all replicas, in the order of their ranks."""
    if replicas.size == 1:
        return x_LD
    count = torch.tensor([len(x_LD)], device=x_LD.device)
    counts = [torch.empty_like(count) for _ in range(replicas.size)]
    dist.all_gather(counts, count, group=replicas.handle)
    most = max(int(c) for c in counts)
    padded = torch.nn.functional.pad(x_LD, (0, 0, 0, most - len(x_LD)))
    found = [torch.empty_like(padded) for _ in range(replicas.size)]
    dist.all_gather(found, padded, group=replicas.handle)
    return torch.cat([rows[: int(c)] for rows, c in zip(found, counts, strict=True)])[:LARGEST_SAMPLE]
