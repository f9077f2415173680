"""Choice of a backend by measurement: all that are available run once on the shape of the run, and the fastest is kept.

Times are kept in the user's cache, by processor and shape; the first measurement stays, so that runs of one machine
choose alike.

Shapes: T rows, K slots, N experts of a cluster, D hidden, F expert hidden, R rank.
"""

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_dist.compression.cluster_weights import ClusterWeights
from moe_dist.config import MoEConfig
from moe_dist.kernels.c_compiler import cache_folder, processor_features
from moe_dist.kernels.shared_base_experts import available_backends, choose_backend, clustered_experts

MOST_ROWS = 1024
"""Largest number of rows measured."""
LEAST_WORK = 10**8
"""Floating-point operations of a base's forward pass below which nothing is measured: the choice would not matter."""
ROUNDS = 3
"""Forward and backward passes of each backend, after one that warms up; the median counts."""
MARGIN = 1.03
"""Least advantage over the default for another backend to be taken."""
_VERSION = 1


@dataclass(frozen=True)
class BackendShape:
    """Shape of one cluster's work on a rank; `rows` tokens reach it at a time."""

    rows: int
    top_k: int
    experts: int
    hidden: int
    expert_hidden: int
    rank: int
    vectors: bool
    dtype: str

    @classmethod
    def of(
        cls, moe: MoEConfig, hidden: int, dtype: str, tokens: int, ranks: int = 1, shards: int = 1
    ) -> "BackendShape":
        """Return the shape of a cluster's work on a rank, with tokens spread evenly over the clusters.

        Args:
            tokens: tokens of each rank.
            ranks: ranks that hold all clusters once.
            shards: ranks that divide the experts of a cluster.
        """
        return cls(
            rows=-(-tokens * ranks * moe.top_clusters // moe.clusters),
            top_k=moe.top_k,
            experts=moe.experts_per_cluster // shards,
            hidden=hidden,
            expert_hidden=moe.expert_hidden,
            rank=moe.rank,
            vectors=moe.expert_vectors,
            dtype=dtype,
        )

    @property
    def work(self) -> int:
        """Floating-point operations of the base's three products in a forward pass."""
        return 6 * self.rows * self.hidden * self.expert_hidden


@dataclass(frozen=True)
class BackendTimes:
    """Seconds of a forward and backward pass by backend; none: it was not measured, and the default is taken."""

    seconds: dict[str, float]
    default: str

    @property
    def fastest(self) -> str:
        """Fastest backend; the default unless another is clearly faster."""
        if not self.seconds:
            return self.default
        found = min(self.seconds, key=self.seconds.__getitem__)
        return found if self.seconds[self.default] > MARGIN * self.seconds[found] else self.default

    def __str__(self) -> str:
        """Return the chosen backend and its speed beside the others."""
        own, others = self.seconds.get(self.fastest), [name for name in self.seconds if name != self.fastest]
        if not own or not others:
            return f"{self.fastest} ({'no other was available' if own else 'not measured'})"
        speeds = (
            f"{self.seconds[name] / own:.2f} times {'as fast as' if name == others[0] else 'as'} {name}"
            for name in others
        )
        return f"{self.fastest}: {', '.join(speeds)}"


def measure_backends(shape: BackendShape, device: torch.device) -> BackendTimes:
    """Time the available backends on random weights and rows, or return the times of an earlier measurement."""
    dtype = getattr(torch, shape.dtype)
    abstract = ClusterWeights.without_values(
        shape.experts, shape.hidden, shape.expert_hidden, shape.rank, vectors=shape.vectors, dtype=dtype
    )
    default = choose_backend(device, dtype, abstract)
    found = available_backends(device, dtype, shape.rank, shape.expert_hidden)
    names = [name for name in found if name != "triton" or device.type != "cpu"]  # not Triton's interpreter
    if shape.work < LEAST_WORK or len(names) == 1:
        return BackendTimes({}, default)
    file = _cache_file(shape, device)
    seconds = _read(file)
    if seconds is None or set(seconds) != set(names):
        seconds = _keep(file, _time(shape, device, names))
    return BackendTimes(seconds, default)


def _time(shape: BackendShape, device: torch.device, names: list[str]) -> dict[str, float]:
    inputs = _draw(shape, device)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(1 + ROUNDS):
        for name in names:
            taken[name].append(_seconds(lambda name=name: _forward_backward(inputs, name)))  # type: ignore[misc]
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def _draw(shape: BackendShape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, ClusterWeights]:
    """Return x_TD, slot_TK, gate_TK and weights; the global random state is not used."""
    draw, dtype = torch.Generator().manual_seed(0), getattr(torch, shape.dtype)
    rows, top_k = min(shape.rows, MOST_ROWS), min(shape.top_k, shape.experts)
    abstract = ClusterWeights.without_values(
        shape.experts, shape.hidden, shape.expert_hidden, shape.rank, vectors=shape.vectors, dtype=dtype
    )

    def leaf(*size: int) -> Tensor:
        drawn: Tensor = torch.randn(size, generator=draw) * size[-1] ** -0.5
        return drawn.to(device, dtype).requires_grad_()

    weights = ClusterWeights(**{name: leaf(*x.shape) for name, x in vars(abstract).items() if x is not None})
    slot_TK = torch.rand(rows, shape.experts, generator=draw).argsort(1)[:, :top_k].to(device)
    gate_TK = torch.full((rows, top_k), 1 / top_k, device=device, requires_grad=True)
    return leaf(rows, shape.hidden), slot_TK, gate_TK, weights


def _forward_backward(inputs: tuple[Tensor, Tensor, Tensor, ClusterWeights], backend: str) -> None:
    x_TD, slot_TK, gate_TK, weights = inputs
    with torch.enable_grad():
        y_TD = clustered_experts(x_TD, slot_TK, gate_TK, weights, backend)
        leaves = [x_TD, gate_TK, *(x for x in vars(weights).values() if x is not None)]
        torch.autograd.grad(y_TD, leaves, torch.ones_like(y_TD))


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def _cache_file(shape: BackendShape, device: torch.device) -> Path | None:
    """Return the file of this shape on this machine; None: there is no private cache folder."""
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_features()
    isa = (platform.machine(), os.environ.get("MOE_DIST_ISA", "native"))
    parts = [_VERSION, asdict(shape), device.type, place, *isa, torch.get_num_threads(), str(torch.__version__)]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    try:
        return cache_folder("backends") / f"{name}.json"
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return None


def _read(file: Path | None) -> dict[str, float] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file is not None else None
    except (OSError, ValueError):
        return None
    valid = isinstance(found, dict) and all(isinstance(taken, float) and taken > 0 for taken in found.values())
    return found if valid and found else None


def _keep(file: Path | None, seconds: dict[str, float]) -> dict[str, float]:
    """Write the times unless another process was first, and return those that stay."""
    if file is None:
        return seconds
    with suppress(OSError), tempfile.NamedTemporaryFile("w", dir=file.parent, encoding="utf-8") as partial:
        json.dump(seconds, partial)
        partial.flush()
        with suppress(FileExistsError):
            os.link(partial.name, file)
    kept = _read(file)
    return kept if kept is not None and set(kept) == set(seconds) else seconds
