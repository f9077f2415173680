"""Commands that exchange models with Hugging Face checkpoints."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.options import Overrides
from moe_dist.errors import LaunchError
from moe_dist.launch.files import new_folder_name, require_run


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("import")(import_)
    app.command("generate")(generate)
    app.command("serve")(serve)


def import_(
    source: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder of config.json and safetensors, .gguf file, or name on the hub."),
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
    keep: Annotated[
        float | None,
        typer.Option(min=0.001, max=1, help="Compress a mixture to this share of its expert parameters, by moe.rank."),
    ] = None,
) -> None:
    """Write a Hugging Face model as a run: as it is, or with moe.kind=clustered or standard upcycled or compressed."""
    target = new_folder_name(output)
    if not source.exists() and str(source).count("/") != 1:
        raise LaunchError(f"{source} does not exist: give a folder with config.json and safetensors, or a .gguf file")
    from moe_dist.distributed.init import shutdown
    from moe_dist.integrations.huggingface.import_model import ImportOptions, import_model

    try:
        options = ImportOptions(noise, tuple(text or ()), tokens, keep)
        done = import_model(source, target, overrides or (), options)
    finally:
        shutdown()  # of a compression
    moe = done.config.moe
    typer.echo(f"{output}: {done.architecture}, {done.parameters:,} parameters, {moe.layer_kind.describe(moe)}")
    for layer, errors in enumerate(done.output_errors):
        mean = sum(errors) / len(errors)
        typer.echo(f"layer {layer}: relative error of the experts' outputs {mean:.3f}, largest {max(errors):.3f}")


def generate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, a checkpoint, or an export for transformers.")
    ],
    prompt: Annotated[list[str], typer.Option(help="Text to continue; several make one batch.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Limit of generated tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token each time.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1, help="Draw from the likeliest tokens of this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="A prompt is a message in the tokenizer's chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream/--whole", help="Print tokens as they come (one prompt).")] = True,
) -> None:
    """Continue a text with a trained model, through the classes of transformers."""
    require_run(run)
    from moe_dist.integrations.huggingface.generate import GenerationOptions
    from moe_dist.integrations.huggingface.generate import generate as continuations

    stream = stream and len(prompt) == 1
    options = GenerationOptions(max_tokens, temperature, top_p, seed, chat)
    found = continuations(run, prompt, options, stream)
    for text in () if stream else found:
        typer.echo(text)


def serve(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run, a checkpoint, or an export for transformers.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
) -> None:
    """Serve a trained model with the HTTP interface of OpenAI, by `transformers serve`."""
    require_run(run)
    from moe_dist.integrations.huggingface.serve import serve as served

    served(run, host, port)
