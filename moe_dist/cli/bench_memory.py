"""`moe-dist bench memory`: what training takes in memory."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.words import Clusters, ExpertWidth, Json, ResidualRank, Threads, Width, drop_none
from moe_dist.console import wide_console
from moe_dist.launch.rank import writable


def bench_memory(
    hidden: Width = None,
    expert_hidden: ExpertWidth = None,
    layers: Annotated[int | None, typer.Option(help="Layers of the model.")] = None,
    experts: Annotated[int | None, typer.Option(help="E: experts in a layer.")] = None,
    clusters: Clusters = None,
    rank: ResidualRank = None,
    sequences: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of each run; the first is not timed.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Rounds over all cases; medians are reported.")] = None,
    threads: Threads = None,
    budget: Annotated[float | None, typer.Option(help="As memory.device_budget_ratio.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="A case to run; may be given again. Default: all.")] = None,
    json_file: Json = None,
) -> None:
    """Compare the memory of training with dense, standard, clustered and offloaded experts, a process for each case."""
    given = drop_none(
        hidden=hidden,
        expert_hidden=expert_hidden,
        layers=layers,
        experts=experts,
        clusters=clusters,
        rank=rank,
        sequences=sequences,
        sequence_length=sequence_length,
        steps=steps,
        repeats=repeats,
        threads=threads,
        budget=budget,
        cases=tuple(case) if case else None,
    )
    target = json_file and writable(json_file)
    from moe_dist.benchmarks import memory as memory_bench
    from moe_dist.metrics import write_json

    spec = memory_bench.MemoryBenchSpec(**given)
    console = wide_console()
    result = memory_bench.run_memory_bench(spec, console.print)
    memory_bench.render(result, console)
    if target is not None:
        write_json(Path(target), result.to_dict())
