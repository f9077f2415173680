"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/experiment/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that win over CONFIG.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here, as JSON.")]
Ranks = Annotated[int | None, typer.Option(help="How many; default: what the keys under `world` say.")]
Nodes = Annotated[int | None, typer.Option(help="Machines; default: this one, or all of the host file.")]
RanksPerNode = Annotated[int | None, typer.Option(help="Ranks on each machine; default: its slots.")]
Hostfile = Annotated[Path | None, typer.Option(help="Machines, a line `HOST slots=N` for each.")]
Port = Annotated[int, typer.Option(help="Where ranks of several machines meet, on the first.")]
