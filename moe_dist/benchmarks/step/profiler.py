"""Profiler that divides the time of a step into parts, forward and backward, by marks at which a part begins.

The time from one mark to the next belongs to the part of the first. In the forward pass a wrapped function marks its
beginning and its end. In the backward pass the marks are hooks on autograd nodes: time belongs to a part from the
moment before its last node runs backward, and to the part around it from the moment before the nodes that made its
inputs run. Autograd runs nodes in the reverse order of their creation, so parts do not mix. The accumulation of weight
gradients, with DeepSpeed's copies to its buckets, belongs to the part in which it happens.

On an asynchronous device every mark synchronizes, so that a step takes longer than usual.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

_MARKED = "moe_dist.part"  # key in a node's metadata


class StepPart(StrEnum):
    """Part of a training step."""

    DATA = "data"  # waiting for the batch
    ATTENTION = "attention"
    ROUTING = "routing"
    PERMUTE = "permute"
    ALL_TO_ALL = "all_to_all"
    EXPERTS = "experts"
    COUNTERS = "counters"  # loads, traffic, statistics for re-clustering
    REDUCTION = "reduction"  # of gradients (their copies to buckets too), norms, counts; gathering of updated weights
    OPTIMIZER = "optimizer"
    WAITING = "waiting"  # until the last rank has joined a collective
    METRICS = "metrics"  # figures of a step and their files
    ELSE = "else"  # embeddings, norms, the loss, and what is between


@dataclass
class StepProfiler:
    """Seconds by part since `clear`, while `running`."""

    running: bool = False
    part: StepPart = StepPart.ELSE
    seconds: defaultdict[StepPart, float] = field(default_factory=lambda: defaultdict(float))
    on_switch: Callable[[bool], None] = lambda running: None
    """Callback for start (true) and stop (false)."""
    _since: float = 0.0

    def start(self) -> None:
        """Start the profile; time belongs to `ELSE` until the first mark."""
        self.on_switch(True)
        self.running, self.part, self._since = True, StepPart.ELSE, _now()

    def stop(self) -> None:
        """Stop the profile; marks have no effect until the next start."""
        self.enter(StepPart.ELSE)
        self.running = False
        self.on_switch(False)

    def clear(self) -> None:
        """Reset all sums."""
        self.seconds.clear()

    def enter(self, part: StepPart) -> StepPart:
        """Begin a part; return the part that was running."""
        before = self.part
        if self.running:
            now = _now()
            self.seconds[before] += now - self._since
            self.part, self._since = part, now
        return before

    def wrap(self, part: StepPart, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the same function with its time, forward and backward, in `part`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.running:
                return function(*args, **kwargs)
            around = self.enter(part)
            self._mark(around, (args, kwargs))
            try:
                result = function(*args, **kwargs)
            finally:
                self.enter(around)
            self._mark(part, result)
            return result

        return timed

    def _mark(self, part: StepPart, value: Any) -> None:
        """Begin `part` in the backward pass before autograd runs the nodes that made the tensors in `value`.

        The first mark of a node counts, which is that of the part that created it: a tensor that a function only passes
        on belongs to neither side.
        """
        for tensor in _tensors(value):
            node: Any = tensor.grad_fn  # torch annotates its metadata wrongly
            if node is not None and _MARKED not in node.metadata:
                node.metadata[_MARKED] = part
                node.register_prehook(lambda _: self._enter_backward(part))

    def _enter_backward(self, part: StepPart) -> None:
        self.enter(part)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
