"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/experiment/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that win over CONFIG.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here, as JSON.")]
