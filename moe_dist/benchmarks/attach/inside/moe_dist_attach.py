"""Counter of the collectives that this process takes part in; standard library and torch only.

All collectives, those of torch's own C++ code (DDP's reducer) too, pass torch's dispatcher as operators of the library
c10d. A kernel above the backends' counts each call, and passes it on. Other operators are not touched.

Bytes are those that this rank sends by the usual algorithm: rings for all-reduce, all-gather and reduce-scatter, a
chain for broadcast and reduce, and what is addressed for all-to-all, gather, scatter and send. Each peer's share is
kept, so that links can be distinguished when the places of all ranks are known.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

FOLDER = "MOE_DIST_ATTACH"
FLUSH_SECONDS = 5.0
Sent = dict[int, float]
"""Bytes to each peer, by its index in the group."""


class Call(NamedTuple):
    """Calls that are counted together."""

    operation: str
    ranks: tuple[int, ...]
    site: str
    backward: bool


class CallCount:
    """Number of calls, bytes to each global rank, and seconds from each call to its end."""

    def __init__(self) -> None:
        self.calls, self.seconds = 0, 0.0
        self.to_rank: dict[int, float] = {}


def _bytes(tensors: Any) -> int:
    """Return the bytes of a tensor, or of all in nested lists."""
    if hasattr(tensors, "numel"):
        return int(tensors.numel() * tensors.element_size())
    return sum(map(_bytes, tensors))


def _ring(total: float, size: int, rank: int) -> Sent:
    return {(rank + 1) % size: total} if size > 1 else {}


def _chain(total: float, size: int, rank: int, root: int, towards: bool) -> Sent:
    """Return what a rank passes on in a chain from the root, or towards it."""
    last = (root - 1) % size
    if size == 1 or rank == (root if towards else last):
        return {}
    return {(rank - 1 if towards else rank + 1) % size: total}


def _all_reduce(size: int, rank: int, tensors: Any, *_: Any) -> Sent:
    return _ring(2 * (size - 1) / size * _bytes(tensors), size, rank)


def _all_gather(size: int, rank: int, outputs: Any, inputs: Any, *_: Any) -> Sent:
    return _ring((size - 1) * _bytes(inputs), size, rank)


def _reduce_scatter(size: int, rank: int, outputs: Any, inputs: Any, *_: Any) -> Sent:
    return _ring((size - 1) / size * _bytes(inputs), size, rank)


def _broadcast(size: int, rank: int, tensors: Any, group: Any, root: int, *_: Any) -> Sent:
    return _chain(_bytes(tensors), size, rank, root, towards=False)


def _reduce(size: int, rank: int, tensors: Any, group: Any, operation: Any, root: int, *_: Any) -> Sent:
    return _chain(_bytes(tensors), size, rank, root, towards=True)


def _gather(size: int, rank: int, outputs: Any, inputs: Any, group: Any, root: int, *_: Any) -> Sent:
    return {} if rank == root else {root: _bytes(inputs)}


def _scatter(size: int, rank: int, outputs: Any, inputs: Any, group: Any, root: int, *_: Any) -> Sent:
    return {peer: _bytes(part) for peer, part in enumerate(inputs[0])} if rank == root else {}


def _all_to_all_base(
    size: int, rank: int, output: Any, whole: Any, group: Any, received: Sequence[int], sent: Sequence[int], *_: Any
) -> Sent:
    rows = sent or [len(whole) // size] * size
    row = _bytes(whole) / max(1, len(whole))
    return {peer: count * row for peer, count in enumerate(rows)}


def _all_to_all(size: int, rank: int, outputs: Any, inputs: Any, *_: Any) -> Sent:
    return {peer: _bytes(part) for peer, part in enumerate(inputs)}


def _send(size: int, rank: int, tensors: Any, group: Any, target: int, *_: Any) -> Sent:
    return {target: _bytes(tensors)}


OPERATIONS: dict[str, tuple[str, Callable[..., Sent]]] = {
    "allreduce_": ("all-reduce", _all_reduce),
    "allreduce_coalesced_": ("all-reduce", _all_reduce),
    "allgather_": ("all-gather", _all_gather),
    "_allgather_base_": ("all-gather", _all_gather),
    "allgather_coalesced_": ("all-gather", _all_gather),
    "allgather_into_tensor_coalesced_": ("all-gather", _all_gather),
    "reduce_scatter_": ("reduce-scatter", _reduce_scatter),
    "_reduce_scatter_base_": ("reduce-scatter", _reduce_scatter),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", _reduce_scatter),
    "broadcast_": ("broadcast", _broadcast),
    "reduce_": ("reduce", _reduce),
    "gather_": ("gather", _gather),
    "scatter_": ("scatter", _scatter),
    "alltoall_base_": ("all-to-all", _all_to_all_base),
    "alltoall_": ("all-to-all", _all_to_all),
    "send": ("send", _send),
}
"""Name of each operator's collective, and function (group size, own index, *operator's arguments) to the bytes sent."""


class CollectiveCounter:
    """Counts of this process, written to a file of their own in the folder of `MOE_DIST_ATTACH`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock, self._written = folder, threading.Lock(), time.monotonic()
        self.counts: dict[Call, CallCount] = {}
        self._groups: dict[str, tuple[int, ...]] = {}
        self._rank: int | None = None

    def add(self, operation: str, arguments: tuple[Any, ...], result: Any, started: float) -> None:
        """Count one call of an operator."""
        import torch.distributed as dist

        if self._rank is None and dist.is_initialized():
            self._rank = dist.get_rank()
        group = self._group_of(arguments)
        if group is None:
            return
        name, sent_of = OPERATIONS[operation]
        ranks, rank = group
        sent = sent_of(len(ranks), rank, *arguments)
        call = Call(name, ranks, _call_site(), _in_backward())
        with self._lock:
            count = self.counts.setdefault(call, CallCount())
            count.calls += 1
            for peer, size in sent.items():
                if peer != rank:
                    count.to_rank[ranks[peer]] = count.to_rank.get(ranks[peer], 0.0) + size
        self._add_time(count, result, started)
        if time.monotonic() - self._written > FLUSH_SECONDS:
            self.write()

    def _add_time(self, count: CallCount, result: Any, started: float) -> None:
        from torch.distributed.distributed_c10d import Work

        def done(_: Any = None) -> None:
            with self._lock:
                count.seconds += time.perf_counter() - started

        work = result[-1] if isinstance(result, tuple) else result
        try:
            Work.unbox(work).get_future().add_done_callback(done)
        except (AttributeError, RuntimeError, TypeError):  # a backend without futures
            done()

    def _group_of(self, arguments: tuple[Any, ...]) -> tuple[tuple[int, ...], int] | None:
        """Return the global ranks of the call's group, and this rank's index; None: the call names no group."""
        import torch
        import torch.distributed as dist

        for argument in arguments:
            if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
                group = dist.ProcessGroup.unbox(argument)
                if group.group_name not in self._groups:
                    self._groups[group.group_name] = _global_ranks(group)
                return self._groups[group.group_name], group.rank()
        return None

    def write(self) -> None:
        """Write the counts so far, atomically."""
        with self._lock:
            rows = [
                {**call._asdict(), "calls": count.calls, "seconds": count.seconds, "to_rank": count.to_rank}
                for call, count in self.counts.items()
            ]
        self._written = time.monotonic()
        if not rows:
            return
        path = self._folder / f"{socket.gethostname()}-{os.getpid()}.json"
        record = {"rank": self._rank or 0, "node": _node(), "calls": rows}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record), encoding="utf-8")
        partial.replace(path)


def _global_ranks(group: Any) -> tuple[int, ...]:
    import torch.distributed as dist

    try:
        return tuple(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):  # one that torch's Python side does not know
        return tuple(range(group.size()))


def _node() -> str:
    """Return a name of this machine, distinct where launchers number several on one host."""
    number = next((os.environ[name] for name in ("GROUP_RANK", "SLURM_NODEID") if name in os.environ), "")
    return f"{socket.gethostname()}/{number}"


def _in_backward() -> bool:
    import torch

    return bool(torch._C._current_graph_task_id() != -1)


LIBRARIES = (
    "/torch/",
    "/moe_dist/benchmarks/collective_timer.py",
    "/deepspeed/comm/",
    "/deepspeed/utils/",
    "/typing_extensions.py",
    "/contextlib.py",
)
"""Parts of the paths of code that passes calls on."""


def _call_site() -> str:
    """Return the innermost line outside of torch that led here, with the class of its object."""
    for frame in _callers():
        code = frame.f_code
        if code.co_filename == __file__ or any(part in code.co_filename.replace(os.sep, "/") for part in LIBRARIES):
            continue
        name = getattr(code, "co_qualname", code.co_name)
        owner = frame.f_locals.get("self")
        where = "/".join(Path(code.co_filename).parts[-2:])
        inside = f" ({type(owner).__name__})" if owner is not None and type(owner).__name__ not in name else ""
        return f"{where}:{frame.f_lineno} {name}{inside}"
    return "torch"


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


_KEPT: list[Any] = []
"""The registration, which ends with its object."""


def install() -> None:
    """Count from now on, if the folder is named in the environment."""
    if FOLDER not in os.environ or _KEPT:
        return
    counter = CollectiveCounter(Path(os.environ[FOLDER]))
    count_with(counter)
    atexit.register(counter.write)


def count_with(counter: CollectiveCounter) -> None:
    """Count all collectives of this process from now on."""
    import torch

    library = torch.library.Library("c10d", "IMPL")
    for operation in OPERATIONS:
        overloads = getattr(torch.ops.c10d, operation, None)
        if overloads is None:  # of another version of torch
            continue
        kernel = _counting(overloads.default, operation, counter)
        for device in ("CPU", "CUDA", "XPU", "PrivateUse1"):
            library.impl(operation, kernel, f"Autograd{device}", with_keyset=True)
    _KEPT.append(library)


def _counting(overload: Any, operation: str, counter: CollectiveCounter) -> Callable[..., Any]:
    import torch

    below = torch._C._after_autograd_keyset

    def kernel(keyset: Any, *arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = overload.redispatch(keyset & below, *arguments, **options)
        counter.add(operation, arguments, result, started)
        return result

    return kernel
