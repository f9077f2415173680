"""`moe-dist bench precision`: bytes per expert by storage format."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.cli.options import Json
from moe_dist.config import load_config
from moe_dist.console import wide_console
from moe_dist.metrics import write_json


def bench_precision(
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="precision.KEY=value", help="Storage format of clusters.")
    ] = None,
    clusters: Annotated[int | None, typer.Option(help="G of every shape, instead of those shown.")] = None,
    rank: Annotated[int | None, typer.Option(help="r of every shape, instead of those shown.")] = None,
    vectors: Annotated[bool, typer.Option(help="Experts with vectors.")] = True,
    json_file: Json = None,
) -> None:
    """Count bytes per expert at published shapes: standard, clustered, quantized; runs nothing."""
    config = load_config(None, ["precision.residuals=post", "precision.bases=bfloat16", *(overrides or ())])
    from moe_dist.benchmarks import precision as precision_table
    from moe_dist.moe.quantized_experts import storage_format

    given = {"clusters": clusters, "rank": rank}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    shapes = [replace(shape, **changes) for shape in precision_table.PUBLISHED]
    form = storage_format(config)
    rows = [precision_table.count(shape, form, vectors) for shape in shapes]
    precision_table.render(rows, form, wide_console())
    if json_file is not None:
        write_json(Path(json_file), precision_table.to_dict(rows, form))
