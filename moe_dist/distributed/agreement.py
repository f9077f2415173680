"""Comparison and collection of values over ranks."""

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from moe_dist.distributed.mesh import GroupKind, Mesh

Value = TypeVar("Value")


def differing_ranks(value: int, device: torch.device) -> list[int]:
    """Return the ranks whose value differs from rank 0's, the same list on all ranks; collective."""
    mine = torch.tensor([value], device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [rank for rank, other in enumerate(found) if not torch.equal(other, found[0])]


def gather_over_stages(mesh: Mesh, value: Value) -> list[Value]:
    """Return the value of each pipeline stage, from this rank's position in it; collective over the stages."""
    if mesh.shape.pipeline == 1:
        return [value]
    group = mesh.group(GroupKind.PIPELINE)
    found: list[Any] = [None] * group.size
    dist.all_gather_object(found, value, group=group.handle)
    return cast(list[Value], found)
