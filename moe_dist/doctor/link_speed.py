"""Bandwidth of one kind of link between ranks, and offsets of their clocks."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_dist.distributed.init import RankInfo
from moe_dist.distributed.links import LinkKind, Links

BYTES_TO_PEER = 4 * 2**20
BYTES_AT_MOST = 256 * 2**20  # that a rank sends in one exchange
ROUNDS = 5


@dataclass(frozen=True)
class Speed:
    """Result of an all-to-all.

    Attributes:
        bytes_per_second: out of the busiest rank (inside a node) or node (between nodes), median over rounds.
        wrong_ranks: ranks that received wrong data.
    """

    bytes_per_second: float
    wrong_ranks: tuple[int, ...]


def exchange_speed(process: RankInfo, links: Links, kind: LinkKind) -> Speed | None:
    """Measure one kind of link by an all-to-all among the peers that it joins, or return None; collective."""
    nodes = tuple(links.node_of_rank)
    all_links = [Links(rank, nodes) for rank in range(process.ranks)]
    joined = [[own.kind(peer) is kind for peer in range(process.ranks)] for own in all_links]
    most = max(map(sum, joined))
    if most == 0:
        return None
    size = min(BYTES_TO_PEER, BYTES_AT_MOST // most)
    split = [size * wanted for wanted in joined[process.rank]]  # symmetric: each pair sends both ways
    sent = torch.full((sum(split),), process.rank % 251, dtype=torch.uint8, device=process.device)
    received = torch.empty_like(sent)
    seconds = [_timed_exchange(received, sent, split, process) for _ in range(ROUNDS + 1)][1:]  # the first connects
    expected = torch.tensor([peer % 251 for peer in range(process.ranks)], dtype=torch.uint8, device=process.device)
    right = torch.equal(received, expected.repeat_interleave(torch.tensor(split, device=process.device)))
    wrong = torch.zeros(process.ranks, device=process.device)
    wrong[process.rank] = not right
    dist.all_reduce(wrong)
    per_rank = [sum(row) * size for row in joined]
    if kind is LinkKind.INTER_NODE:
        per_node = [sum(sent for sent, at in zip(per_rank, nodes, strict=True) if at == node) for node in set(nodes)]
        busiest = max(per_node)
    else:
        busiest = max(per_rank)
    return Speed(busiest / statistics.median(seconds), tuple(wrong.nonzero().flatten().tolist()))


def _timed_exchange(received: torch.Tensor, sent: torch.Tensor, split: list[int], process: RankInfo) -> float:
    """Return the seconds of the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    dist.all_to_all_single(received, sent, split, split)
    if process.device.type != "cpu":
        torch.accelerator.synchronize()
    longest = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=process.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def clock_offsets(process: RankInfo, ranks: Sequence[int]) -> list[float]:
    """Return the offsets of some ranks' clocks to rank 0's, in seconds; valid on rank 0. Collective.

    As in NTP: a rank's answer is assigned to the middle of the round trip; the fastest of several rounds counts.
    """
    offsets = [0.0 if rank == 0 else _offset(process, rank) for rank in ranks]
    dist.barrier()
    return offsets


def _offset(process: RankInfo, other: int) -> float:
    clock, best = torch.zeros(1, dtype=torch.float64, device=process.device), (float("inf"), 0.0)
    for _ in range(ROUNDS):
        if process.rank == 0:
            asked = time.time()
            dist.send(clock, other)
            dist.recv(clock, other)
            told, answered = float(clock), time.time()
            best = min(best, (answered - asked, told - (asked + answered) / 2))
        elif process.rank == other:
            dist.recv(clock, 0)
            clock.fill_(time.time())
            dist.send(clock, 0)
    return best[1]
