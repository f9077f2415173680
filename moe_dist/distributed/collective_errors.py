"""Errors of rank-local work that must stop all ranks."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from moe_dist.errors import MoeDistError


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise on all ranks if the block fails on any, so that no rank waits for a failed one in a later collective.

    Collective at the end of the block. The block must therefore contain no collective after a statement that may fail.

    Raises:
        MoeDistError: the block failed on this rank.
        ConnectionError: the block failed on another rank; the message has the rank and its error.
    """
    own: MoeDistError | None = None
    try:
        yield
    except MoeDistError as error:
        own = error
    problems = _gather_problems(None if own is None else str(own))
    if own is not None:
        raise own
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise ConnectionError(f"rank {rank} failed: {problem}")


def _gather_problems(problem: str | None) -> list[str | None]:
    if not dist.is_initialized():
        return [problem]
    problems = [problem] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return problems
