"""`moe-dist bench recluster`: what a re-clustering round costs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launcher.train import writable
from moe_dist.cli.words import Json


def bench_recluster(
    experts: Annotated[list[int] | None, typer.Option(help="E: experts in the layer; may be given again.")] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="d = f: width of experts; may be given again.")] = None,
    clusters: Annotated[int | None, typer.Option(help="G: clusters of experts.")] = None,
    rank: Annotated[int | None, typer.Option(help="r: rank of an expert's residual.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens of an expert that whitening is fitted to.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds; the median is reported.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and tokens.")] = None,
    json_file: Json = None,
) -> None:
    """CPU time of the parts of a re-clustering round of one layer: similarity, assignment, factorising; one process."""
    given: dict[str, Any] = {
        "experts": tuple(experts) if experts else None,
        "hidden": tuple(hidden) if hidden else None,
        "clusters": clusters,
        "rank": rank,
        "tokens": tokens,
        "threads": threads,
        "repeats": repeats,
        "seed": seed,
    }
    target = json_file and writable(json_file)
    from moe_dist.measurement import recluster_bench
    from moe_dist.metrics import write_json

    spec = recluster_bench.ReclusterBenchSpec(**{name: value for name, value in given.items() if value is not None})
    console = Console()
    result = recluster_bench.run_recluster_bench(spec, console.print)
    recluster_bench.render(result, console)
    if target is not None:
        write_json(Path(target), result.to_dict())
