"""Commands that exchange models with Hugging Face checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.options import Overrides
from moe_dist.errors import LaunchError


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("import")(import_)


def import_(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL", help="Folder with config.json and safetensors, or a .gguf file.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Folder of the run to write.")],
    overrides: Overrides = None,
    noise: Annotated[
        float,
        typer.Option(min=0, help="Noise on copies of a dense network as standard experts, over their deviation."),
    ] = 0.01,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Calibration text of a compression, as corpus.paths. Default: Python's library source."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=256, help="Calibration tokens of a compression.")] = 32768,
) -> None:
    """Write a Hugging Face model as a run: as it is, or with moe.kind=clustered or standard upcycled or compressed."""
    if not output.absolute().parent.is_dir():
        raise LaunchError(f"--output {output}: {output.absolute().parent} is no folder: give a name in one that exists")
    if not source.exists():
        raise LaunchError(f"{source} does not exist: give a folder with config.json and safetensors, or a .gguf file")
    from moe_dist.distributed.init import shutdown
    from moe_dist.integrations.huggingface.import_model import ImportOptions, import_model

    try:
        done = import_model(source, output, overrides or (), ImportOptions(noise, tuple(text or ()), tokens))
    finally:
        shutdown()  # of a compression
    moe = done.config.moe
    typer.echo(f"{output}: {done.architecture}, {done.parameters:,} parameters, {moe.layer_kind.describe(moe)}")
    for layer, errors in enumerate(done.output_errors):
        mean = sum(errors) / len(errors)
        typer.echo(f"layer {layer}: relative error of the experts' outputs {mean:.3f}, largest {max(errors):.3f}")
