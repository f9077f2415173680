"""Commands on the trained weights of a run."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_dist.cli.options import TrainedRun
from moe_dist.launch.files import new_folder_name, require_run, writable

if TYPE_CHECKING:
    import torch

    from moe_dist.checkpoint.trained_weights import TrainedWeights


class ExportFormat(StrEnum):
    """Kind of an export."""

    FILE = "file"
    HF = "hf"


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
            "-o",
            "--output",
            metavar="FILE",
            help="The .safetensors file to write, replacing an existing one; with --format hf a new folder.",
        ),
    ],
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="file: one file that `eval` reads; hf: a folder that transformers loads."),
    ] = ExportFormat.FILE,
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
    """Write a run's trained weights and configuration to one safetensors file, or to a folder for transformers."""
    target = new_folder_name(output, "--output") if form is ExportFormat.HF else Path(writable(output, "--output"))
    require_run(run)
    import torch

    from moe_dist.checkpoint.export import export_weights
    from moe_dist.checkpoint.trained_weights import find_weights

    weights = find_weights(run)
    if stored is None:
        stored = weights.config.precision.residuals != "none"
    wanted = getattr(torch, dtype.value) if dtype else None
    if form is ExportFormat.HF:
        typer.echo(f"{output}: {_export_folder(run, weights, target, wanted, stored)}")
        return
    count = export_weights(weights, target, wanted, stored=stored)
    kind = dtype.value if dtype else weights.config.train.precision if stored else ExportDtype.FLOAT32.value
    few = f", factors in {weights.config.precision.bits} bits" if stored else ""
    size = target.stat().st_size
    typer.echo(f"{output}: {count:,} weights of step {weights.manifest.step} as {kind}{few}, {size:,} bytes")


def _export_folder(
    run: Path, weights: "TrainedWeights", target: Path, dtype: "torch.dtype | None", quantized: bool
) -> str:
    """Write a folder for transformers, and return its description."""
    from moe_dist.evaluation.trained_model import tokenizer_of
    from moe_dist.integrations.huggingface.export_model import export_model

    done = export_model(weights, tokenizer_of(run, weights), target, dtype, quantized=quantized)
    return f"{done.architecture}, {done.parameters:,} weights of step {weights.manifest.step}, {done.nbytes:,} bytes"
