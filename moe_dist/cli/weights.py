"""Commands on the trained weights of a run."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.options import TrainedRun
from moe_dist.launch.files import require_run, writable


class ExportDtype(StrEnum):
    """Data type of exported weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("export")(export)


def export(
    run: TrainedRun,
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="FILE", help="The .safetensors file to write, replacing an existing one."
        ),
    ],
    dtype: Annotated[
        ExportDtype | None,
        typer.Option(
            help="Type of the weights in the file. Default: float32, with --stored the run's train.precision."
        ),
    ] = None,
    stored: Annotated[
        bool | None,
        typer.Option("--stored/--plain", help="Store quantized factors. Default: as precision.residuals."),
    ] = None,
) -> None:
    """Write a run's trained weights to one safetensors file, its configuration and placement in the file's metadata."""
    target = Path(writable(output, "--output"))
    require_run(run)
    import torch

    from moe_dist.checkpoint.export import export_weights
    from moe_dist.checkpoint.trained_weights import find_weights

    weights = find_weights(run)
    if stored is None:
        stored = weights.config.precision.residuals != "none"
    count = export_weights(weights, target, getattr(torch, dtype.value) if dtype else None, stored=stored)
    kind = dtype.value if dtype else weights.config.train.precision if stored else ExportDtype.FLOAT32.value
    few = f", factors in {weights.config.precision.bits} bits" if stored else ""
    size = target.stat().st_size
    typer.echo(f"{output}: {count:,} weights of step {weights.manifest.step} as {kind}{few}, {size:,} bytes")
