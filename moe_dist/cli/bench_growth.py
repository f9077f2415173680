"""`moe-dist bench growth`: cost of more experts."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.benchmarks.layer.spec import GrowthSpec
from moe_dist.cli.options import Json, takes
from moe_dist.console import wide_console
from moe_dist.launch.files import writable
from moe_dist.metrics import write_json


@takes(spec=GrowthSpec)
def bench_growth(
    spec: GrowthSpec,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw time and weights, as PNG.")] = None,
    json_file: Json = None,
) -> None:
    """Measure time and memory of clustered and standard layers as E grows, k fixed and G = sqrt(2E); one process."""
    picture = plot and writable(plot, "--plot")
    spec.check()
    from moe_dist.benchmarks.growth import bench as growth

    console = wide_console()
    result = growth.run_growth(spec, console.print)
    growth.render(result, console)
    if picture is not None:
        from moe_dist.benchmarks.growth.plot import plot_growth

        plot_growth(result, Path(picture))
    if json_file is not None:
        write_json(Path(json_file), result.to_dict())
