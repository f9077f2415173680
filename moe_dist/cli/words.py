"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.launch.job import Launcher

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/experiment/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that win over CONFIG.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here, as JSON.")]

# Where ranks run.
StartedBy = Annotated[Launcher, typer.Option(help="Who starts the ranks.")]
Ranks = Annotated[int | None, typer.Option(help="How many; default: what the keys under `world` say.")]
Nodes = Annotated[int | None, typer.Option(help="Machines; default: this one, or all of the host file.")]
RanksPerNode = Annotated[int | None, typer.Option(help="Ranks on each machine; default: its slots.")]
Hostfile = Annotated[Path | None, typer.Option(help="Machines, a line `HOST slots=N` for each.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Where ranks of several machines meet, on the first.")]

# The layer that a bench measures, and how; None: as the bench's own specification has it (`said`).
Width = Annotated[int | None, typer.Option(help="d: width of the model.")]
ExpertWidth = Annotated[int | None, typer.Option(help="f: hidden width of an expert.")]
SeveralExperts = Annotated[list[int] | None, typer.Option(help="E: experts in the layer; may be given again.")]
Clusters = Annotated[int | None, typer.Option(help="G: clusters of experts.")]
ResidualRank = Annotated[int | None, typer.Option(help="r: rank of an expert's residual.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads.")]
Repeats = Annotated[int | None, typer.Option(help="Timed rounds; the median is reported.")]
Seed = Annotated[int | None, typer.Option(help="Seed of weights and tokens.")]

# Recipes that are trained and compared.
Seeds = Annotated[int, typer.Option(min=1, help="Runs of each recipe, seeds 0 and on.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, of one thread each.")]
RecipeFolder = Annotated[Path, typer.Option(help="Folder of the quality-*.yaml files.")]
FinishedRuns = Annotated[Path, typer.Option(help="Where finished runs are kept.")]


def drop_none(**options: Any) -> dict[str, Any]:
    """The options that were given: those that are None are left out, so that a specification's own defaults hold."""
    return {name: value for name, value in options.items() if value is not None}
