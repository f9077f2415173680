"""`moe-dist bench recluster`: what a re-clustering round costs."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.words import Clusters, Json, Repeats, ResidualRank, Seed, SeveralExperts, Threads, drop_none
from moe_dist.console import wide_console
from moe_dist.launch.rank import writable


def bench_recluster(
    experts: SeveralExperts = None,
    hidden: Annotated[list[int] | None, typer.Option(help="d = f: width of experts; may be given again.")] = None,
    clusters: Clusters = None,
    rank: ResidualRank = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of an expert that whitening is fitted to.")] = None,
    threads: Threads = None,
    repeats: Repeats = None,
    seed: Seed = None,
    json_file: Json = None,
) -> None:
    """CPU time of the parts of a re-clustering round of one layer: similarity, assignment, factorising; one process."""
    given = drop_none(
        experts=tuple(experts) if experts else None,
        hidden=tuple(hidden) if hidden else None,
        clusters=clusters,
        rank=rank,
        tokens=tokens,
        threads=threads,
        repeats=repeats,
        seed=seed,
    )
    target = json_file and writable(json_file)
    from moe_dist.benchmarks import recluster as recluster_bench
    from moe_dist.metrics import write_json

    spec = recluster_bench.ReclusterBenchSpec(**given)
    console = wide_console()
    result = recluster_bench.run_recluster_bench(spec, console.print)
    recluster_bench.render(result, console)
    if target is not None:
        write_json(Path(target), result.to_dict())
