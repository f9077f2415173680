"""Speed of one feed-forward layer: clustered experts against standard experts and the dense floor, side by side.

All contenders get the same tokens and the same drawn routing (the router is left out), in one process, one after
the other in every round, so that a busy machine slows them alike: ratios are taken within a round, and their median and
quartiles are reported. A time is forward + backward, with gradients of the input, the gates and all weights:

    dense       SwiGLU of width f on every token: the floor, the cost of a token's base
    standard    k of E full experts: sort by expert, gather, experts, weighted scatter (loop over leaf parameters, and
                grouped_mm over weights stacked beforehand); ratios use the faster one
    clustered   k experts of one cluster on a shared base: sort by cluster, gather, clustered experts, scatter

Shapes: T tokens, K slots, P = T K rows sorted by expert, D model width.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from moe_dist.benchmarks.layer.spec import LayerBenchSpec
from moe_dist.compression import ClusterWeights, init_base, init_residual
from moe_dist.console import titled_table
from moe_dist.errors import ConfigError
from moe_dist.kernels import BACKENDS, clustered_experts
from moe_dist.kernels.backend_choice import BackendShape, measure_backends
from moe_dist.metrics.spread import Spread
from moe_dist.moe.standard_experts import experts_grouped, experts_loop, swiglu

_STANDARD = ("standard/loop", "standard/grouped_mm")


@dataclass(frozen=True)
class LayerBenchCase:
    """Result of one dtype and k: seconds of each contender, and ratios within rounds."""

    dtype: str
    top_k: int
    backend: str
    compiled: bool
    standard: str
    seconds: dict[str, Spread]
    speedup: Spread  # standard / clustered
    over_floor: Spread  # clustered / dense
    standard_over_floor: Spread  # standard / dense


@dataclass(frozen=True)
class LayerBenchResult:
    """Result of all cases, with the specification and versions."""

    spec: LayerBenchSpec
    cases: list[LayerBenchCase] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings for JSON; times in seconds."""
        return asdict(self)


@dataclass(frozen=True)
class _Layer:
    """Input, routing and every contender's leaf weights, for one dtype and k."""

    x_TD: Tensor
    d_y_TD: Tensor
    cluster_T: Tensor
    slot_TK: Tensor
    gate_TK: Tensor
    dense: tuple[Tensor, Tensor]
    loop: list[tuple[Tensor, Tensor]]
    stacked: tuple[Tensor, Tensor]
    clustered: list[ClusterWeights]

    def leaves(self) -> Iterator[Tensor]:
        """Return all tensors that get a gradient."""
        yield from (self.x_TD, self.gate_TK, *self.dense, *self.stacked)
        for pair in self.loop:
            yield from pair
        for weights in self.clustered:
            yield from (w for w in vars(weights).values() if w is not None)


def run_layer_bench(spec: LayerBenchSpec) -> LayerBenchResult:
    """Measure all cases of `spec` in this process, on `spec.threads` threads.

    Raises:
        ConfigError: a backend is unknown, or the device is not available.
    """
    if unknown := sorted({spec.backend, *spec.backends} - set(BACKENDS)):
        raise ConfigError(f"backend {unknown[0]!r} is unknown: use one of {', '.join(BACKENDS)}")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    available = ["cpu", *([accelerator.type] if accelerator else [])]
    if spec.device not in available:
        raise ConfigError(f"device {spec.device!r} is not available: use {' or '.join(available)}")
    result = LayerBenchResult(spec, [], {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()})
    with _threads(spec.threads):
        for dtype in spec.dtypes:
            result.cases.extend(_measure(spec, dtype, top_k) for top_k in spec.top_k)
    return result


def render(result: LayerBenchResult, console: Console) -> None:
    """Print one table: a row for each contender, a block for each dtype and k."""
    s = result.spec
    title = (
        f"forward + backward, T={s.tokens} d={s.hidden} f={s.expert_hidden} E={s.experts} G={s.clusters} r={s.rank}"
        f"{' vectors' if s.vectors else ''}, {s.threads} thread(s), median of {s.repeats} rounds [quartiles]"
    )
    table = titled_table(title, "dtype", "k", "layer")
    for name in ("ms", "standard / this", "this / dense floor"):
        table.add_column(name, justify="right")
    for case in result.cases:
        for name, seconds in case.seconds.items():
            label = f"{name} ({case.backend})" if name == "clustered" else name
            speedup = case.speedup if name == "clustered" else None
            floor = {"clustered": case.over_floor, case.standard: case.standard_over_floor}.get(name)
            table.add_row(
                case.dtype,
                str(case.top_k),
                label,
                seconds.text(1e3, 0),
                *(s.text() if s else "" for s in (speedup, floor)),
            )
        table.add_section()
    console.print(table)


def _measure(spec: LayerBenchSpec, dtype: str, top_k: int) -> LayerBenchCase:
    layer = _draw_layer(spec, getattr(torch, dtype), top_k)
    backend = spec.backend
    if backend == "auto":
        shape = BackendShape(
            rows=spec.tokens // spec.clusters,
            top_k=top_k,
            experts=spec.experts // spec.clusters,
            hidden=spec.hidden,
            expert_hidden=spec.expert_hidden,
            rank=spec.rank,
            vectors=spec.vectors,
            dtype=dtype,
        )
        backend = measure_backends(shape, layer.x_TD.device).fastest
    rounds = _time_rounds(layer, _contenders(layer, backend, spec.backends), spec.repeats)
    standard = min(_STANDARD, key=lambda name: statistics.median(rounds[name]))

    return LayerBenchCase(
        dtype=dtype,
        top_k=top_k,
        backend=backend,
        compiled=backend == "cpu",
        standard=standard,
        seconds={name: Spread.of(seconds) for name, seconds in rounds.items()},
        speedup=Spread.of_ratios(rounds[standard], rounds["clustered"]),
        over_floor=Spread.of_ratios(rounds["clustered"], rounds["dense"]),
        standard_over_floor=Spread.of_ratios(rounds[standard], rounds["dense"]),
    )


def _contenders(layer: _Layer, backend: str, more_backends: Sequence[str]) -> dict[str, Callable[[], Tensor]]:
    contenders: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: swiglu(layer.x_TD @ layer.dense[0]) @ layer.dense[1],
        "clustered": lambda: _clustered(layer, backend),
        _STANDARD[0]: lambda: _standard(layer, grouped=False),
        _STANDARD[1]: lambda: _standard(layer, grouped=True),
    }
    return contenders | {f"clustered/{name}": functools.partial(_clustered, layer, name) for name in more_backends}


def _time_rounds(layer: _Layer, contenders: dict[str, Callable[[], Tensor]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each contender in each round; the first round warms up; each starts a round in turn."""
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(repeats + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            for leaf in layer.leaves():
                leaf.grad = None
            _wait_for(layer.x_TD.device)
            start = time.perf_counter()
            contenders[name]().backward(layer.d_y_TD)
            _wait_for(layer.x_TD.device)
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait_for(device: torch.device) -> None:
    """Wait until an accelerator has finished its queue."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _standard(layer: _Layer, grouped: bool) -> Tensor:
    top_k, experts = layer.slot_TK.shape[1], len(layer.loop)
    expert_P = (layer.cluster_T[:, None] * (experts // len(layer.clustered)) + layer.slot_TK).flatten()
    order_P = torch.argsort(expert_P, stable=True)
    counts_E, token_P = torch.bincount(expert_P, minlength=experts), order_P // top_k
    x_PD = layer.x_TD.index_select(0, token_P)
    if grouped:
        y_PD = experts_grouped(x_PD, counts_E, *layer.stacked)
    else:
        w_in, w_out = zip(*layer.loop, strict=True)
        y_PD = experts_loop(x_PD, counts_E.tolist(), w_in, w_out)
    gate_P1 = layer.gate_TK.flatten().index_select(0, order_P)[:, None].to(y_PD.dtype)
    return torch.zeros_like(layer.x_TD).index_add_(0, token_P, y_PD * gate_P1)


def _clustered(layer: _Layer, backend: str) -> Tensor:
    order_T = torch.argsort(layer.cluster_T, stable=True)
    counts = torch.bincount(layer.cluster_T, minlength=len(layer.clustered)).tolist()
    routed = (layer.x_TD, layer.slot_TK, layer.gate_TK)
    parts = (torch.split(t.index_select(0, order_T), counts) for t in routed)
    outputs = [
        clustered_experts(x, slot, gate, weights, backend)
        for x, slot, gate, weights in zip(*parts, layer.clustered, strict=True)
    ]
    return torch.empty_like(layer.x_TD).index_copy(0, order_T, torch.cat(outputs))


def _draw_layer(spec: LayerBenchSpec, dtype: torch.dtype, top_k: int) -> _Layer:
    """Draw weights and a roughly balanced routing: a cluster per token, k of its experts, gates that sum to 1."""
    generator = torch.Generator().manual_seed(spec.seed)
    size = spec.experts // spec.clusters
    x_TD, d_y_TD = torch.randn(2, spec.tokens, spec.hidden, generator=generator).to(dtype).unbind()

    def leaf(value: Tensor, to: torch.dtype = dtype) -> Tensor:
        return value.detach().to(spec.device, to, copy=True).requires_grad_()

    def full_expert() -> tuple[Tensor, Tensor]:
        pair = init_base(spec.hidden, spec.expert_hidden, spec.hidden**-0.5, spec.expert_hidden**-0.5, generator)
        return leaf(pair[0]), leaf(pair[1])

    loop = [full_expert() for _ in range(spec.experts)]
    w_in, w_out = zip(*loop, strict=True)
    return _Layer(
        x_TD=leaf(x_TD),
        d_y_TD=d_y_TD.to(spec.device),
        cluster_T=torch.randint(spec.clusters, (spec.tokens,), generator=generator).to(spec.device),
        slot_TK=torch.rand(spec.tokens, size, generator=generator).topk(top_k).indices.to(spec.device),
        gate_TK=leaf(torch.rand(spec.tokens, top_k, generator=generator).softmax(1), torch.float32),
        dense=full_expert(),
        loop=loop,
        stacked=(leaf(torch.stack(w_in)), leaf(torch.stack(w_out))),
        clustered=[_draw_cluster(spec, full_expert(), leaf, generator) for _ in range(spec.clusters)],
    )


def _draw_cluster(
    spec: LayerBenchSpec,
    base: tuple[Tensor, Tensor],
    leaf: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> ClusterWeights:
    residuals = [
        vars(init_residual(spec.hidden, spec.expert_hidden, spec.rank, spec.vectors, generator))
        for _ in range(spec.experts // spec.clusters)
    ]
    columns: list[Any] = [[r[name] for r in residuals] for name in residuals[0]]  # in ClusterWeights' order
    stacked: list[Any] = [None if c[0] is None else leaf(torch.stack(c)) for c in columns]
    return ClusterWeights(*base, *stacked)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
