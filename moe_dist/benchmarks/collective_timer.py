"""Timer and byte counter of a process's collectives, whoever issues them: the dispatchers, DeepSpeed, other libraries.

Enter `timing_collectives()` before DeepSpeed is initialized, which keeps references to the functions. While
`CollectiveTimer.active` is false the collectives are unchanged. Then each is preceded by a barrier of its group, which
separates the time until all ranks have joined (`waiting`) from the exchange, and asynchronous ones become synchronous.
A step takes somewhat longer: shares mean more than times.
"""

import inspect
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist


class StepPhase(StrEnum):
    """Part of the time of a step."""

    COMPUTE = "compute"
    ALL_TO_ALL = "all_to_all"
    REDUCTION = "reduction"  # of gradients, norms and counts, and the gathering of updated weights
    WAITING = "waiting"  # until the last rank has joined a collective


WATCHED = {
    StepPhase.ALL_TO_ALL: ("all_to_all_single", "all_to_all"),
    StepPhase.REDUCTION: (
        "all_reduce",
        "reduce",
        "broadcast",
        "reduce_scatter",
        "reduce_scatter_tensor",
        "all_gather",
        "all_gather_into_tensor",
    ),
}


class _Done:
    """Handle of a completed collective."""

    def wait(self, *_: object) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@dataclass
class CollectiveTimer:
    """Seconds by part, and all-to-all bytes by receiving global rank, since `clear`."""

    active: bool = False
    seconds: defaultdict[StepPhase, float] = field(default_factory=lambda: defaultdict(float))
    bytes_to: Counter[int] = field(default_factory=Counter)
    messages_to: Counter[int] = field(default_factory=Counter)

    def clear(self) -> None:
        """Reset all sums; `active` stays."""
        self.seconds.clear()
        self.bytes_to.clear()
        self.messages_to.clear()

    def wrap(self, part: StepPhase, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same collective; while the timer is active, a barrier precedes it and `part` gets its time."""
        signature = inspect.signature(function)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not self.active:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            self.active = False  # a collective may call others
            try:
                self._run(part, function, given)
            finally:
                self.active = True
            return _Done() if given.arguments.get("async_op") else None

        return watched

    def _run(self, part: StepPhase, function: Callable[..., Any], given: inspect.BoundArguments) -> None:
        group = given.arguments.get("group")
        arguments = {**given.arguments, "async_op": False}
        with self.phase(StepPhase.WAITING):
            if dist.get_world_size(group) > 1:
                dist.barrier(group=group)
        with self.phase(part):
            function(**arguments)
        if part is StepPhase.ALL_TO_ALL:
            self._count(arguments, dist.get_process_group_ranks(group or dist.group.WORLD))

    @contextmanager
    def phase(self, part: StepPhase) -> Iterator[None]:
        """Add the time of the block to `part`."""
        _settle()
        started = time.perf_counter()
        with torch.profiler.record_function(f"moe-dist {part}"):
            yield
            _settle()
        self.seconds[part] += time.perf_counter() - started

    def _count(self, arguments: dict[str, Any], ranks: Sequence[int]) -> None:
        for peer, chunk in zip(ranks, _chunks(arguments, len(ranks)), strict=True):
            if peer != dist.get_rank() and chunk.numel():
                self.bytes_to[peer] += chunk.numel() * chunk.element_size()
                self.messages_to[peer] += 1


def _chunks(arguments: dict[str, Any], ranks: int) -> Sequence[torch.Tensor]:
    if "input_tensor_list" in arguments:
        return list(arguments["input_tensor_list"])
    sizes = arguments.get("input_split_sizes")
    given: torch.Tensor = arguments["input"]
    return given.split(list(sizes)) if sizes else given.chunk(ranks)


def _settle() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


@contextmanager
def timing_collectives(timer: CollectiveTimer | None = None) -> Iterator[CollectiveTimer]:
    """Put a timer between torch.distributed and everything that calls its collectives through the module."""
    timer = timer or CollectiveTimer()
    before = {name: (part, getattr(dist, name)) for part, names in WATCHED.items() for name in names}
    for name, (part, function) in before.items():
        setattr(dist, name, timer.wrap(part, function))
    try:
        yield timer
    finally:
        for name, (_, function) in before.items():
            setattr(dist, name, function)
