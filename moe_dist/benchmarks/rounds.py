"""Interleaved timing: contenders run one after the other in every round, so that a busy machine slows them alike."""

import time
from collections.abc import Mapping

import torch
import torch.distributed as dist

from moe_dist.benchmarks.layer.contenders import Contender
from moe_dist.distributed.init import RankInfo

Seconds = dict[str, list[float]]


def inputs(tokens: int, hidden: int, dtype: str, process: RankInfo, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return this rank's input of every contender, x_TD, and the gradient of its output; drawn by rank."""
    draw = torch.Generator().manual_seed(seed * 1009 + process.rank)
    drawn = torch.randn(2, tokens, hidden, generator=draw).to(process.device, getattr(torch, dtype))
    return drawn[0].requires_grad_(), drawn[1]


def time_rounds(contenders: Mapping[str, Contender], x_TD: torch.Tensor, d_y_TD: torch.Tensor, repeats: int) -> Seconds:
    """Return the seconds of each contender in each round, forward + backward, of the slowest rank; collective.

    A first round warms up, and each contender starts a round in turn. Ranks start a contender together.
    """
    names = list(contenders)
    mine: Seconds = {name: [] for name in names}
    for index in range(repeats + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            contenders[name].forget()
            x_TD.grad = None
            _meet()
            started = time.perf_counter()
            contenders[name].run(x_TD, d_y_TD)
            _settle()
            if index:
                mine[name].append(time.perf_counter() - started)
        for contender in contenders.values():
            contender.forget()
    return _slowest(mine, x_TD.device)


def _slowest(mine: Seconds, device: torch.device) -> Seconds:
    seconds = torch.tensor(list(mine.values()), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return dict(zip(mine, seconds.tolist(), strict=True))


def _meet() -> None:
    _settle()
    if dist.is_initialized():
        dist.barrier()


def _settle() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
