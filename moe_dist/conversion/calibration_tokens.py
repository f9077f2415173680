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

from moe_dist.distributed.mesh import GroupKind, Mesh, RankGroup
from moe_dist.model.language_model import LanguageModel
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.standard_moe import StandardMoE

LARGEST_SAMPLE = 4096
"""Limit of the tokens kept per expert; more would not change second moments much."""

LayerTokens = dict[int, Tensor]
"""Tokens x_LD of each local expert by its number, float32."""


@dataclass(frozen=True)
class _Post:
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
    return float(mean) / dist.get_world_size()


def sample_tokens(model: LanguageModel, batches_BS: Sequence[Tensor]) -> tuple[list[LayerTokens], float]:
    """Return the tokens of each local expert of each layer on some batches, and the mean loss over all ranks;
    collective.

    Replicas of an expert share what they saw, so that they go on alike.

    Args:
        batches_BS: this rank's micro-batches, as many on every rank.
    """
    mesh = model.context.mesh
    posts = [_standard_posts(layer, mesh) for layer in standard_layers(model)]
    posts += [_clustered_posts(layer) for layer in model.clustered_layers()]
    caught: list[dict[int, list[Tensor]]] = [{e: [] for post in layer for e in post.experts} for layer in posts]
    with ExitStack() as watching:
        for layer, rows in zip(posts, caught, strict=True):
            for post in layer:
                watching.enter_context(_watch(post, rows))
        loss = mean_loss(model, batches_BS)
    replicas, nothing = mesh.group(GroupKind.EXPERT_DATA), torch.zeros(0, model.config.model.hidden_size)
    device = batches_BS[0].device
    tokens = [
        {e: _shared(torch.cat([nothing.to(device), *rows])[:LARGEST_SAMPLE], replicas) for e, rows in layer.items()}
        for layer in caught
    ]
    return tokens, loss


def _standard_posts(layer: StandardMoE, mesh: Mesh) -> list[_Post]:
    group, local = layer.dispatch.channel.group, len(layer.experts.w_in)
    first = group.ranks.index(mesh.rank) * local

    def divide(x_PD: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
        return torch.split(x_PD, list(counts))

    return [_Post(layer.experts, tuple(range(first, first + local)), divide)]


def _clustered_posts(layer: ClusteredMoE) -> list[_Post]:
    at, placement = layer.context.mesh.at, layer.placement
    posts = []
    for cluster, part in zip(placement.clusters_of_block(at.cluster), layer.clusters, strict=True):
        experts = placement.experts_of(cluster, at.shard)

        def divide(x_AD: Tensor, slot_AK: Tensor, _: Tensor, slots: int = len(experts)) -> Sequence[Tensor]:
            return [x_AD[(slot_AK == slot).any(1)] for slot in range(slots)]

        posts.append(_Post(part, experts, divide))
    return posts


@contextmanager
def _watch(post: _Post, caught: dict[int, list[Tensor]]) -> Iterator[None]:
    def catch(_: nn.Module, inputs: Any) -> None:
        for expert, x_LD in zip(post.experts, post.divide(*inputs), strict=True):
            if sum(map(len, caught[expert])) < LARGEST_SAMPLE:
                caught[expert].append(x_LD.float().clone())

    hook = post.module.register_forward_pre_hook(catch)
    try:
        yield
    finally:
        hook.remove()


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
