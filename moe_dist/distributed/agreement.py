"""Comparison of a value over all ranks."""

import torch
import torch.distributed as dist

from moe_dist.distributed.init import RankInfo


def differing_ranks(value: int, process: RankInfo) -> list[int]:
    """Return the ranks whose value differs from rank 0's, the same list on all ranks; collective."""
    mine = torch.tensor([value], device=process.device)
    found = [torch.empty_like(mine) for _ in range(process.ranks)]
    dist.all_gather(found, mine)
    return [rank for rank, other in enumerate(found) if not torch.equal(other, found[0])]
