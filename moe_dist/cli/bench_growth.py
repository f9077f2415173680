"""`moe-dist bench growth`: what more experts cost."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launcher.train import writable
from moe_dist.cli.words import Json
from moe_dist.measurement.layers.spec import GrowthSpec, LayerShape


def bench_growth(
    experts: Annotated[list[int] | None, typer.Option(help="E: experts in the layer; may be given again.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens in the batch.")] = None,
    hidden: Annotated[int | None, typer.Option(help="d: width of the model.")] = None,
    expert_hidden: Annotated[int | None, typer.Option(help="f: hidden width of an expert.")] = None,
    rank: Annotated[int | None, typer.Option(help="r: rank of an expert's residual.")] = None,
    top_k: Annotated[int | None, typer.Option(help="k: experts a token.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds; the median is reported.")] = None,
    standard_up_to: Annotated[int | None, typer.Option(help="No standard layer beyond so many.")] = None,
    json_file: Json = None,
) -> None:
    """Time and memory of clustered and standard layers as E grows, k fixed and G = sqrt(2E); one process."""
    shape = {"tokens": tokens, "hidden": hidden, "expert_hidden": expert_hidden, "rank": rank}
    given: dict[str, Any] = {
        "shape": LayerShape(**_said(shape)),
        "experts": tuple(experts) if experts else None,
        "top_k": top_k,
        "dtype": dtype,
        "threads": threads,
        "repeats": repeats,
        "standard_up_to": standard_up_to,
    }
    target = json_file and writable(json_file)
    spec = GrowthSpec(**_said(given))
    spec.check()
    from moe_dist.measurement.layers import growth
    from moe_dist.metrics import write_json

    console = Console()
    result = growth.run_growth(spec, console.print)
    growth.render(result, console)
    if target is not None:
        write_json(Path(target), result.to_dict())


def _said(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}
