"""`moe-dist bench layer --ranks`: whole MoE layers on ranks, ours and those of other libraries, beside the dense floor.

All contenders have routers of their own and get the same tokens (with --routing: those of a record of their own kind of
choice), one after the other in every round. Times are
forward + backward of the slowest rank, without the reduction of gradients. Bytes are those of all-to-alls, counted in
one more pass by the same wrapper for all contenders. The floor of our own layers is the minimum for their routing: one
vector of each token to each other rank that holds a cluster of its choice, and one back, in both passes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from moe_dist.benchmarks.collective_timer import CollectiveTimer, timing_collectives
from moe_dist.benchmarks.layer.contenders import DENSE, STANDARD, Contender, build, mesh_for
from moe_dist.benchmarks.layer.recorded_routing import RoutingRecord
from moe_dist.benchmarks.layer.spec import CLUSTERED, LIBRARIES, RanksBenchSpec, overlapped
from moe_dist.benchmarks.rounds import inputs, time_rounds
from moe_dist.config import RunConfig
from moe_dist.console import titled_table, wide_console
from moe_dist.dispatch.chunked_overlap import ExchangeSpeed, choose_chunks
from moe_dist.dispatch.routing_trace import RoutingTrace
from moe_dist.distributed.init import RankInfo, init_distributed, shutdown
from moe_dist.distributed.mesh import Mesh
from moe_dist.metrics import installed_versions, write_json
from moe_dist.metrics.spread import Spread
from moe_dist.moe.clustered_moe import ClusteredMoE
from moe_dist.moe.overlap_probe import measure_exchange_speed

_WIDTH = 120  # columns of the table, also where the output goes to a file
PASSES = 4  # dispatch and combine, forward and backward


@dataclass(frozen=True)
class Bytes:
    """All-to-all bytes to other ranks, summed over ranks, per token."""

    counted: float
    floor: float | None
    """Minimum for the routing; None: unknown, for layers of other libraries."""


@dataclass(frozen=True)
class OverlapFigures:
    """Number of chunks of an overlapped layer, with the measured speeds if it was chosen automatically."""

    chunks: int
    speed: ExchangeSpeed | None = None


@dataclass(frozen=True)
class RanksBenchCase:
    """Result of one dtype and k: seconds, ratios within rounds, and bytes of each contender."""

    dtype: str
    top_k: int
    seconds: dict[str, Spread]
    over_dense: dict[str, Spread]
    peer_over_clustered: dict[str, Spread]
    """Time of the fastest other library (without one: standard) over that of each clustered layer."""
    fastest_peer: str
    bytes_per_token: dict[str, Bytes]
    hops: dict[str, OverlapFigures]
    """Choices of the layers with overlap, by name."""
    replayed: tuple[str, ...] = ()
    """Layers whose routing is a recorded one; the others get random tokens."""


@dataclass(frozen=True)
class RanksBenchResult:
    """Result of all cases, with the specification and versions."""

    spec: RanksBenchSpec
    ranks: int
    threads: int
    cases: list[RanksBenchCase] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=installed_versions)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and strings for JSON; times in seconds."""
        return asdict(self)


def bench_ranks(config: RunConfig, spec: RanksBenchSpec) -> None:
    """Measure every case, and print and write the figures on rank 0; collective.

    Raises:
        ConfigError: the layer cannot be divided over so many ranks.
    """
    with timing_collectives() as timer:  # before DeepSpeed and Megatron-core are initialised
        process = init_distributed(config.world)
        spec.check(process.ranks)
        mesh = mesh_for(spec.shape, process)
        result = RanksBenchResult(spec, process.ranks, torch.get_num_threads())
        for dtype in spec.dtypes:
            result.cases.extend(_measure(spec, dtype, top_k, process, mesh, timer) for top_k in spec.top_k)
    if process.rank == 0:
        console = wide_console()
        console.width = max(console.width, _WIDTH)
        render(result, console)
        if spec.json_file is not None:
            write_json(Path(spec.json_file), result.to_dict())
    shutdown()


def _measure(
    spec: RanksBenchSpec, dtype: str, top_k: int, process: RankInfo, mesh: Mesh, timer: CollectiveTimer
) -> RanksBenchCase:
    shape, ours = spec.shape, (*CLUSTERED, *map(overlapped, spec.overlap))
    names = (DENSE, *ours, STANDARD, *spec.peers)
    contenders = {name: build(name, shape, dtype, top_k, process, mesh) for name in names}
    records = [RoutingRecord.read(Path(file)) for file in spec.routing]
    replayed = dict(_replayed(contenders, records, shape.tokens, process))
    contenders |= replayed
    hops = {overlapped(asked): _divide(contenders[overlapped(asked)], asked, shape.tokens) for asked in spec.overlap}
    x_TD, d_y_TD = inputs(shape.tokens, shape.hidden, dtype, process, shape.seed)
    rounds = time_rounds(contenders, x_TD, d_y_TD, spec.repeats)
    seconds = {name: Spread.of(values) for name, values in rounds.items()}
    libraries = [name for name in spec.peers if name in LIBRARIES] or [STANDARD]  # the standard layer by others
    peer = min(libraries, key=lambda name: seconds[name].median)
    return RanksBenchCase(
        dtype=dtype,
        top_k=top_k,
        seconds=seconds,
        over_dense={name: Spread.of_ratios(values, rounds[DENSE]) for name, values in rounds.items()},
        peer_over_clustered={name: Spread.of_ratios(rounds[peer], rounds[name]) for name in ours},
        fastest_peer=peer,
        bytes_per_token=count_bytes(contenders, x_TD, d_y_TD, process, timer),
        hops=hops,
        replayed=tuple(replayed),
    )


def _replayed(
    contenders: Mapping[str, Contender], records: Sequence[RoutingRecord], tokens: int, process: RankInfo
) -> Iterator[tuple[str, Contender]]:
    """Yield the contenders whose choices are recorded, with routers and tokens that repeat them."""
    for name, contender in contenders.items():
        if contender.router is not None and contender.config is not None:
            kind, moe = contender.config.moe.kind, contender.config.moe
            if (record := next((one for one in records if one.suits(kind, moe)), None)) is not None:
                yield name, contender.replay(record, tokens, process)


def _divide(contender: Contender, asked: str, tokens: int) -> OverlapFigures:
    """Set the layer's number of chunks as that value of `moe.overlap_chunks` does; collective."""
    layer = contender.module
    assert isinstance(layer, ClusteredMoE)
    if layer.stage_one.alone:
        hop = OverlapFigures(1)
    elif asked == "auto":
        speed = measure_exchange_speed(layer, tokens)
        hop = OverlapFigures(choose_chunks(speed), speed)
    else:
        hop = OverlapFigures(int(asked))
    layer.set_chunks(hop.chunks)
    return hop


def count_bytes(
    contenders: Mapping[str, Contender], x_TD: Tensor, d_y_TD: Tensor, process: RankInfo, timer: CollectiveTimer
) -> dict[str, Bytes]:
    """Count the bytes of each contender in one more pass; collective."""
    counted = torch.zeros(len(contenders), 2, dtype=torch.int64)
    for row, contender in zip(counted, contenders.values(), strict=True):
        observed = RoutingTrace(process.rank, [0] * process.ranks)
        if contender.ledger is not None:
            contender.ledger.observer = observed
        timer.clear()
        timer.active = True
        contender.run(x_TD, d_y_TD)
        timer.active = False
        row[0], row[1] = sum(timer.bytes_to.values()), _rows_needed_elsewhere(observed)
        if contender.ledger is not None:
            contender.ledger.observer = None
    dist.all_reduce(counted := counted.to(process.device))
    tokens = len(x_TD) * process.ranks
    found = {}
    for (name, contender), (total, rows) in zip(contenders.items(), counted.tolist(), strict=True):
        floor = PASSES * rows * contender.vector_bytes / tokens
        found[name] = Bytes(total / tokens, None if contender.ledger is None and total else floor)
    return found


def _rows_needed_elsewhere(observed: RoutingTrace) -> int:
    return sum(
        int(rows)
        for needs in observed.needs.values()
        for rank, rows in zip(needs.group, needs.needed_P, strict=True)
        if rank != observed.rank
    )


def render(result: RanksBenchResult, console: Console) -> None:
    """Print one table: a row for each contender, a block for each dtype and k; after `overlap` the number of chunks."""
    shape = result.spec.shape
    title = (
        f"forward + backward on {result.ranks} ranks of {result.threads} thread(s), T={shape.tokens} per rank "
        f"d={shape.hidden} f={shape.expert_hidden} E={shape.experts} G={shape.clusters} r={shape.rank}"
        f"{' vectors' if shape.vectors else ''}, median of {result.spec.repeats} rounds [quartiles]"
    )
    table = titled_table(title, "dtype", "k", "layer")
    for name in ("ms", "this / dense", "best peer / this", "bytes a token", "floor"):
        table.add_column(name, justify="right")
    for case in result.cases:
        for name, seconds in case.seconds.items():
            faster, sent = case.peer_over_clustered.get(name), case.bytes_per_token[name]
            table.add_row(
                case.dtype,
                str(case.top_k),
                _shown(case, name),
                seconds.text(1e3, 0),
                case.over_dense[name].text(),
                f"{faster.text()} ({case.fastest_peer})" if faster else "",
                f"{sent.counted:,.1f}",
                "" if sent.floor is None else f"{sent.floor:,.1f}",
            )
        table.add_section()
    if any(case.replayed for case in result.cases):
        table.caption = f"*: routing of {', '.join(result.spec.routing)}; the others route random tokens"
    console.print(table)


def _shown(case: RanksBenchCase, name: str) -> str:
    chunks = f" ({case.hops[name].chunks})" if name in case.hops else ""
    return f"{name}{chunks}{' *' if name in case.replayed else ''}"
