"""Work that each rank does by itself, but that all must have done before they go on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from moe_dist.errors import MoeDistError


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Ranks leave the block together: where one could not do it, all stop, and none waits for it in a collective.

    Collective at the end of the block, which therefore holds none after what may fail.

    Raises:
        MoeDistError: this rank's own.
        ConnectionError: another rank's, which this one follows; it says which and why.
    """
    own: MoeDistError | None = None
    try:
        yield
    except MoeDistError as error:
        own = error
    problems = _of_all_ranks(None if own is None else str(own))
    if own is not None:
        raise own
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise ConnectionError(f"rank {rank} failed: {problem}")


def _of_all_ranks(problem: str | None) -> list[str | None]:
    if not dist.is_initialized():
        return [problem]
    problems = [problem] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return problems
