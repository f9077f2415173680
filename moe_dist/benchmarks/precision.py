"""Bytes per expert: standard, clustered, and clustered with quantized factors, at the shapes of published models.

Counted from the tensors of one whole layer, built on the `meta` device; a base's bytes are divided among the experts of
its cluster. Routers, which all kinds have alike, are left out.

Shapes: E experts of a layer, G clusters of N = E / G, D model width, F hidden width, R rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from moe_dist.compression import ClusterWeights, QuantizedCluster, StorageFormat
from moe_dist.errors import ConfigError
from moe_dist.moe.standard_experts import StandardExperts

BF16 = torch.bfloat16


@dataclass(frozen=True)
class PublishedShape:
    """Layer of experts of a published model, and its clustering."""

    name: str
    experts: int
    hidden: int
    expert_hidden: int
    clusters: int
    rank: int

    def __post_init__(self) -> None:
        if self.clusters < 1 or self.experts % self.clusters:
            raise ConfigError(f"{self.name}: {self.experts} experts cannot be divided over {self.clusters} clusters")
        if not 1 <= self.rank <= min(self.hidden, self.expert_hidden):
            raise ConfigError(
                f"{self.name}: rank {self.rank} must be in 1 to {min(self.hidden, self.expert_hidden)}, the smaller of "
                "its widths"
            )


PUBLISHED = (
    PublishedShape("Mixtral 8x7B", experts=8, hidden=4096, expert_hidden=14336, clusters=2, rank=128),
    PublishedShape("OLMoE 1B-7B", experts=64, hidden=2048, expert_hidden=1024, clusters=8, rank=32),
    PublishedShape("DeepSeek-V3", experts=256, hidden=7168, expert_hidden=2048, clusters=32, rank=64),
)
"""Experts and widths as published (DeepSeek-V3: its 256 routed experts); clusters and ranks are ours."""


@dataclass(frozen=True)
class ByteRow:
    """Bytes of one expert of a layer, by storage format."""

    shape: PublishedShape
    standard: float
    """Standard expert in bfloat16."""
    clustered: float
    """Clustered expert in bfloat16: its share of the base, its factors and vectors."""
    packed: float
    """Clustered expert with bases and factors in the stored format."""
    own: float
    """Part of `packed` that belongs to the expert alone and moves with it."""


def count(shape: PublishedShape, form: StorageFormat, vectors: bool = True) -> ByteRow:
    """Build the layer three times on the `meta` device and count."""
    standard = StandardExperts(shape.experts, lambda _: _full_expert(shape))
    clusters = list(_clusters(shape, vectors))
    packed = [QuantizedCluster.of(cluster, form) for cluster in clusters]
    bytes_of = {
        "standard": sum(parameter.nbytes for parameter in standard.parameters()),
        "clustered": sum(
            tensor.nbytes for cluster in clusters for tensor in vars(cluster).values() if tensor is not None
        ),
        "packed": sum(cluster.nbytes for cluster in packed),
        "own": sum(cluster.experts.nbytes for cluster in packed),
    }
    return ByteRow(shape, **{name: total / shape.experts for name, total in bytes_of.items()})


def _full_expert(shape: PublishedShape) -> tuple[torch.Tensor, torch.Tensor]:
    d, f = shape.hidden, shape.expert_hidden
    return torch.empty(d, 2 * f, dtype=BF16, device="meta"), torch.empty(f, d, dtype=BF16, device="meta")


def _clusters(shape: PublishedShape, vectors: bool) -> Iterator[ClusterWeights]:
    sizes = (shape.experts // shape.clusters, shape.hidden, shape.expert_hidden, shape.rank)
    for _ in range(shape.clusters):
        yield ClusterWeights.without_values(*sizes, vectors=vectors, dtype=BF16)


def render(rows: Sequence[ByteRow], form: StorageFormat, console: Console) -> None:
    """Print the table."""
    bases, groups = (str(dtype).removeprefix("torch.") for dtype in (form.bases, form.factors.scale_dtype))
    kind = "symmetric" if form.factors.symmetric else "with zero points"
    view = Table(
        title="MB an expert (share of standard), standard and clustered in bfloat16; packed: bases "
        f"{bases}, factors {form.factors.bits} bits in groups of {form.factors.group_size}, {kind}, scales {groups}; "
        "its own: what of that is not base",
        title_justify="left",
        box=SIMPLE,
    )
    for name in ("shape", "E", "G", "r", "standard", "clustered", "packed", "its own"):
        view.add_column(name, justify="left" if name == "shape" else "right")
    for row in rows:
        s = row.shape
        figures = (f"{_mb(size)} ({size / row.standard:.1%})" for size in (row.clustered, row.packed, row.own))
        view.add_row(s.name, str(s.experts), str(s.clusters), str(s.rank), _mb(row.standard), *figures)
    console.print(view)


def to_dict(rows: Sequence[ByteRow], form: StorageFormat) -> dict[str, Any]:
    """Return the figures for `--json`, bytes per expert."""
    stored = {
        **asdict(form.factors),
        "scale_dtype": str(form.factors.scale_dtype).removeprefix("torch."),
        "bases": str(form.bases).removeprefix("torch."),
    }
    return {"stored": stored, "rows": [asdict(row) for row in rows]}


def _mb(size: float) -> str:
    return f"{size / 1e6:.4g}"
