"""Real tokens of every standard expert, caught on their way through the model.

Shapes: P rows sorted by local expert, L rows of one expert, D hidden.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.model.language_model import LanguageModel
from moe_dist.model.standard_layer import StandardMoE
from moe_dist.topology.mesh import GroupKind, RankGroup

LARGEST_SAMPLE = 4096
"""Tokens of an expert that are kept at most; more would not change second moments much."""

LayerTokens = list[Tensor]
"""x_LD of each local expert, float32."""


def standard_layers(model: LanguageModel) -> dict[str, StandardMoE]:
    """The standard MoE layers by their module's name, in the order of the layers."""
    return {name: module for name, module in model.named_modules() if isinstance(module, StandardMoE)}


@torch.no_grad()
def mean_loss(model: LanguageModel, batches_BS: Sequence[Tensor]) -> float:
    """Over all ranks' micro-batches, as many on every rank; collective."""
    with model.evaluating():
        losses = torch.stack([model(batch_BS).double() for batch_BS in batches_BS])
    mean = losses.mean()
    dist.all_reduce(mean)
    return float(mean) / dist.get_world_size()


def sample_tokens(model: LanguageModel, batches_BS: Sequence[Tensor]) -> tuple[list[LayerTokens], float]:
    """What each local expert of each layer is given on some batches, and their mean loss over all ranks; collective.

    Replicas of an expert share what they saw, so that they go on alike.

    Args:
        batches_BS: this rank's micro-batches, as many on every rank.
    """
    layers = standard_layers(model)
    caught: list[list[list[Tensor]]] = [[[] for _ in layer.experts.w_in] for layer in layers.values()]
    with _watching(layers.values(), caught):
        loss = mean_loss(model, batches_BS)
    replicas = model.context.mesh.group(GroupKind.EXPERT_DATA)
    tokens = [[_shared(torch.cat(rows)[:LARGEST_SAMPLE], replicas) for rows in experts] for experts in caught]
    return tokens, loss


@contextmanager
def _watching(layers: Iterable[StandardMoE], caught: list[list[list[Tensor]]]) -> Iterator[None]:
    def catcher(experts: list[list[Tensor]]) -> Any:
        def catch(_: nn.Module, inputs: tuple[Tensor, list[int]]) -> None:
            x_PD, counts = inputs
            for rows, x_LD in zip(experts, x_PD.float().split(list(counts)), strict=True):
                if sum(map(len, rows)) < LARGEST_SAMPLE:
                    rows.append(x_LD.clone())

        return catch

    hooks = [
        layer.experts.register_forward_pre_hook(catcher(experts)) for layer, experts in zip(layers, caught, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _shared(x_LD: Tensor, replicas: RankGroup) -> Tensor:
    """The rows of all replicas, in the order of their ranks."""
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
