"""`moe-dist bench growth`: time and memory of a layer as its number of experts grows, at the same k, in this process.

G grows as sqrt(2E), so that both stages search about sqrt(E) scores. Clustered and standard layers of one size are
timed in one run, interleaved, beside a dense layer, which does not grow: ratios to it make the sizes comparable.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

from moe_dist.benchmarks.layer.contenders import DENSE, STANDARD, Contender, build, mesh_for
from moe_dist.benchmarks.layer.spec import CLUSTERED, GrowthSpec, clusters_for
from moe_dist.benchmarks.rounds import inputs, time_rounds
from moe_dist.benchmarks.saved_bytes import saved_bytes
from moe_dist.config import WorldConfig
from moe_dist.console import titled_table
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.metrics import installed_versions
from moe_dist.metrics.spread import Spread


@dataclass(frozen=True)
class Grown:
    """Result of one layer at one number of experts."""

    seconds: Spread
    over_dense: Spread
    weight_bytes: int
    saved_bytes_per_token: float
    """Bytes per token that the forward pass saves for the backward pass, weights not included."""


@dataclass(frozen=True)
class GrowthCase:
    """Result of all layers at one number of experts."""

    experts: int
    clusters: int
    layers: dict[str, Grown]


@dataclass(frozen=True)
class GrowthResult:
    """Result of all sizes, with the specification and versions."""

    spec: GrowthSpec
    cases: list[GrowthCase] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=installed_versions)

    def grows(self, name: str) -> float:
        """Return the relative growth of the time over the dense layer's, from the fewest experts to the most."""
        first, last = (case.layers[name].over_dense.median for case in (self.cases[0], self.cases[-1]))
        return last / first - 1

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings for JSON; times in seconds."""
        return asdict(self)


def run_growth(spec: GrowthSpec, report: Callable[[str], None] = lambda line: None) -> GrowthResult:
    """Measure all sizes, one after the other, in this process."""
    process = init_distributed(WorldConfig(threads=spec.threads, backend="gloo"))
    result = GrowthResult(spec)
    try:
        for experts in spec.experts:
            report(f"E={experts} ...")
            result.cases.append(_measure(spec, experts, process))
    finally:
        shutdown()
    return result


def _measure(spec: GrowthSpec, experts: int, process: RankInfo) -> GrowthCase:
    shape = replace(spec.shape, experts=experts, clusters=clusters_for(experts))
    names = (DENSE, *CLUSTERED, *((STANDARD,) if experts <= spec.standard_up_to else ()))
    mesh = mesh_for(shape, process)
    contenders = {name: build(name, shape, spec.dtype, spec.top_k, process, mesh) for name in names}
    x_TD, d_y_TD = inputs(shape.tokens, shape.hidden, spec.dtype, process, shape.seed)
    rounds = time_rounds(contenders, x_TD, d_y_TD, spec.repeats)

    def grown(name: str, contender: Contender) -> Grown:
        return Grown(
            Spread.of(rounds[name]),
            Spread.of_ratios(rounds[name], rounds[DENSE]),
            sum(p.numel() * p.element_size() for p in contender.module.parameters()),
            saved_bytes(lambda: contender.module(x_TD), contender.module) / shape.tokens,
        )

    return GrowthCase(experts, shape.clusters, {name: grown(name, each) for name, each in contenders.items()})


def render(result: GrowthResult, console: Console) -> None:
    """Print one table with a block for each number of experts."""
    shape = result.spec.shape
    title = (
        f"forward + backward, T={shape.tokens} d={shape.hidden} f={shape.expert_hidden} r={shape.rank} "
        f"k={result.spec.top_k} {result.spec.dtype}, {torch.get_num_threads()} thread(s), median of "
        f"{result.spec.repeats} rounds [quartiles]"
    )
    table = titled_table(title, "E", "G", "layer")
    for name in ("ms", "this / dense", "weights, MB", "saved, KB per token"):
        table.add_column(name, justify="right")
    for case in result.cases:
        for name, grown in case.layers.items():
            table.add_row(
                str(case.experts),
                str(case.clusters),
                name,
                grown.seconds.text(1e3, 0),
                grown.over_dense.text(),
                f"{grown.weight_bytes / 1e6:,.1f}",
                f"{grown.saved_bytes_per_token / 1e3:.1f}",
            )
        table.add_section()
    console.print(table)
    sizes = f"from E={result.cases[0].experts} to {result.cases[-1].experts}"
    for name in result.cases[-1].layers.keys() - {DENSE}:
        console.print(f"{name}: time over dense grows by {result.grows(name):+.0%} {sizes}")
