"""`moe-dist bench growth`: what more experts cost."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.benchmarks.layer.spec import GrowthSpec, LayerShape
from moe_dist.cli.words import ExpertWidth, Json, Repeats, ResidualRank, SeveralExperts, Threads, Width, drop_none
from moe_dist.console import wide_console
from moe_dist.launch.rank import writable


def bench_growth(
    experts: SeveralExperts = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens in the batch.")] = None,
    hidden: Width = None,
    expert_hidden: ExpertWidth = None,
    rank: ResidualRank = None,
    top_k: Annotated[int | None, typer.Option(help="k: experts a token.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    threads: Threads = None,
    repeats: Repeats = None,
    standard_up_to: Annotated[int | None, typer.Option(help="No standard layer beyond so many.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw time and weights, as PNG.")] = None,
    json_file: Json = None,
) -> None:
    """Time and memory of clustered and standard layers as E grows, k fixed and G = sqrt(2E); one process."""
    shape = drop_none(tokens=tokens, hidden=hidden, expert_hidden=expert_hidden, rank=rank)
    given = drop_none(
        shape=LayerShape(**shape),
        experts=tuple(experts) if experts else None,
        top_k=top_k,
        dtype=dtype,
        threads=threads,
        repeats=repeats,
        standard_up_to=standard_up_to,
    )
    target, picture = json_file and writable(json_file), plot and writable(plot)
    spec = GrowthSpec(**given)
    spec.check()
    from moe_dist.benchmarks.growth import bench as growth
    from moe_dist.metrics import write_json

    console = wide_console()
    result = growth.run_growth(spec, console.print)
    growth.render(result, console)
    if picture is not None:
        from moe_dist.benchmarks.growth.plot import plot_growth

        plot_growth(result, Path(picture))
    if target is not None:
        write_json(Path(target), result.to_dict())
