"""Cost of a re-clustering round on one process, part by part, against the number and the width of the experts.

Experts are drawn (G bases, E residuals), with f = d. Parts of a round of one layer:

    gram        similarity of all effective weights by exact Gram matrices
    sketch      the same by random sketches, which ranks compute of their experts and gather
    assign      balanced assignment from random starts
    assign warm the same from a clustering that is nearly right, without random starts
    factorise   base and residuals of one cluster of full experts, by the seeded search
    whitened    the same fitted to tokens and checked on others (`refit` and the end of a standard warm-up only)

Times are CPU time of this process over all its threads, so that other processes count little.

A round that adopts costs sketch + assign warm (or assign) for each layer, divided among the ranks that hold experts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moe_dist.benchmarks.recluster_spec import ReclusterBenchSpec
from moe_dist.clustering import (
    FactoredProjection,
    assign_balanced,
    gated_projections,
    parameter_similarity,
    sketch_weights,
    sketched_parameter_similarity,
)
from moe_dist.compression import WhiteningRoots, factorize_cluster
from moe_dist.console import titled_table
from moe_dist.metrics.spread import Spread

PARTS = ("gram", "sketch", "assign", "assign warm", "factorise", "whitened")


@dataclass(frozen=True)
class ReclusterBenchCase:
    """CPU seconds of each part of a round for one layer."""

    experts: int
    hidden: int
    seconds: dict[str, Spread]


@dataclass(frozen=True)
class ReclusterBenchResult:
    """Result of all cases, with the specification and versions."""

    spec: ReclusterBenchSpec
    cases: list[ReclusterBenchCase] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings for JSON; times in seconds."""
        return asdict(self)


def run_recluster_bench(spec: ReclusterBenchSpec, report: Callable[[str], None]) -> ReclusterBenchResult:
    """Measure all cases of `spec` in this process, on `spec.threads` threads."""
    result = ReclusterBenchResult(
        spec, [], {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    )
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        for hidden in spec.hidden:
            for experts in spec.experts:
                report(f"d={hidden} E={experts}")
                result.cases.append(_measure(spec, experts, hidden))
    finally:
        torch.set_num_threads(before)
    return result


def render(result: ReclusterBenchResult, console: Console) -> None:
    """Print one table: a row for each width and number of experts."""
    s = result.spec
    title = (
        f"one layer, f = d, G={s.clusters}, r={s.rank}, {s.threads} thread(s): CPU ms, median of {s.repeats} rounds "
        f"\\[quartiles]; factorise and whitened: one cluster, from {s.sampled} of its experts"
    )
    table = titled_table(title, "d", "E")
    for part in PARTS:
        table.add_column(part, justify="right")
    for case in result.cases:
        table.add_row(str(case.hidden), str(case.experts), *(_text(case.seconds[part]) for part in PARTS))
    console.print(table)


def _text(spread: Spread) -> str:
    median, lower, upper = (f"{1e3 * value:.3g}" for value in (spread.median, spread.lower, spread.upper))
    return f"{median} \\[{lower}-{upper}]"


def _measure(spec: ReclusterBenchSpec, experts: int, hidden: int) -> ReclusterBenchCase:
    generator = torch.Generator().manual_seed(spec.seed)
    projections = _draw_projections(spec, experts, hidden, generator)
    sketch_ES = sketch_weights(projections, spec.seed)
    similarity_EE = sketched_parameter_similarity(sketch_ES).numpy()
    nearly_E = torch.arange(experts) // (experts // spec.clusters)
    nearly_E[[0, -1]] = nearly_E[[-1, 0]]
    full = _draw_cluster(spec, hidden, generator)
    members = experts // spec.clusters
    parts: dict[str, tuple[Callable[[], Any], float]] = {
        "gram": (lambda: parameter_similarity(projections), 1),
        "sketch": (lambda: sketched_parameter_similarity(sketch_weights(projections, spec.seed)), 1),
        "assign": (lambda: assign_balanced(similarity_EE, spec.clusters, seed=spec.seed), 1),
        "assign warm": (
            lambda: assign_balanced(similarity_EE, spec.clusters, seed=spec.seed, restarts=0, start=nearly_E.numpy()),
            1,
        ),
        "factorise": (lambda: _factorise(spec, full, whitened=False), members / spec.sampled),
        "whitened": (lambda: _factorise(spec, full, whitened=True), members / spec.sampled),
    }
    seconds = {name: _time(work, spec.repeats, scale) for name, (work, scale) in parts.items()}
    return ReclusterBenchCase(experts, hidden, seconds)


def _time(work: Callable[[], Any], repeats: int, scale: float) -> Spread:
    """Return the CPU time of a function in each round, times `scale`; the first round warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.process_time()
        work()
        seconds.append(scale * (time.process_time() - start))
    return Spread.of(seconds[1:])


@dataclass(frozen=True)
class _FullCluster:
    w_in_NDH: Tensor
    w_out_NFD: Tensor
    fit: Sequence[Tensor]
    check: Sequence[Tensor]


def _factorise(spec: ReclusterBenchSpec, full: _FullCluster, whitened: bool) -> None:
    fit, check = (
        [WhiteningRoots.of_tokens(x, x) for x in tokens] if whitened else None for tokens in (full.fit, full.check)
    )
    usage_N = torch.ones(spec.sampled)
    factorize_cluster(full.w_in_NDH, full.w_out_NFD, usage_N, spec.rank, inputs=fit, check=check, seed=spec.seed)


def _draw_cluster(spec: ReclusterBenchSpec, hidden: int, generator: torch.Generator) -> _FullCluster:
    def draw(*shape: int) -> Tensor:
        return torch.randn(spec.sampled, *shape, generator=generator)

    fit, check = draw(spec.tokens, hidden).unbind(), draw(spec.tokens, hidden).unbind()
    return _FullCluster(draw(hidden, 2 * hidden), draw(hidden, hidden), fit, check)


def _draw_projections(
    spec: ReclusterBenchSpec, experts: int, hidden: int, generator: torch.Generator
) -> tuple[FactoredProjection, ...]:
    def draw(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(shape, generator=generator) * hidden**-0.5
        return drawn

    return gated_projections(
        base_in_CDH=draw(spec.clusters, hidden, 2 * hidden),
        base_out_CFD=draw(spec.clusters, hidden, hidden),
        base_of_E=torch.arange(experts) // (experts // spec.clusters),
        in_u_EDR=draw(experts, hidden, 2 * spec.rank),
        in_v_ERH=draw(experts, 2, spec.rank, hidden),
        out_u_EFR=draw(experts, hidden, spec.rank),
        out_v_ERD=draw(experts, spec.rank, hidden),
    )
