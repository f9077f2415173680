"""Comparison of a value over all ranks."""

import torch
import torch.distributed as dist


def differing_ranks(value: int, device: torch.device) -> list[int]:
    """Return the ranks whose value differs from rank 0's, the same list on all ranks; collective."""
    mine = torch.tensor([value], device=device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [rank for rank, other in enumerate(found) if not torch.equal(other, found[0])]
