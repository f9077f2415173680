"""Commands that exchange models with Hugging Face checkpoints."""

import os
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.options import Overrides, Port, StartedBy, takes
from moe_dist.config.initial_run import TOKENIZER_MODEL
from moe_dist.errors import LaunchError
from moe_dist.integrations.huggingface.import_spec import ImportOptions, ImportSpec
from moe_dist.launch import environment, runners
from moe_dist.launch.files import new_folder_name, require_run
from moe_dist.launch.job import DEFAULT_PORT, Job, JobSize, Launcher, machines
from moe_dist.launch.rank import run_rank
from moe_dist.launch.tasks import IMPORT


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("import")(import_)
    app.command("generate")(generate)
    app.command("serve")(serve)


@takes(size=JobSize, options=ImportOptions)
def import_(
    source: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="Folder of config.json and safetensors, .gguf file, or name on the hub."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="RUN", help="Folder of the run to write.")],
    size: JobSize,
    options: ImportOptions,
    overrides: Overrides = None,
    launcher: StartedBy = Launcher.LOCAL,
    port: Port = DEFAULT_PORT,
) -> None:
    """Write a Hugging Face model as a run: as it is, or with moe.kind=clustered or standard upcycled or compressed.

    The ranks share the layers of a compression. Inside a launcher this process is one of them.
    """
    inside = environment.discover(os.environ).kind != "alone"
    target = output.absolute() if inside else new_folder_name(output)
    if not source.exists() and str(source).count("/") != 1:
        raise LaunchError(f"{source} does not exist: give a folder with config.json and safetensors, or a .gguf file")
    if source.is_dir() and not (source / "config.json").is_file():
        raise LaunchError(f"{source} holds no config.json: give the folder of a Hugging Face model")
    spec = ImportSpec(source.absolute() if source.exists() else source, target, tuple(overrides or ()), options)
    if inside:
        raise typer.Exit(run_rank(None, (), IMPORT, spec))
    if size != JobSize(ranks=size.ranks) or size.ranks not in (None, 1):
        job = Job(launcher, machines(launcher, size, ranks_wanted=1), (), port=port)
        raise typer.Exit(runners.launch(job.with_task(IMPORT, spec)))
    from moe_dist.integrations.huggingface.import_model import import_on_ranks

    import_on_ranks(None, spec)


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
    if not all(prompt):
        raise LaunchError("--prompt '' holds no text to continue: give at least one character")
    if chat and (run / TOKENIZER_MODEL).is_file():
        raise LaunchError(f"--chat: the tokenizer of {run} has no chat template: leave --chat out")
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
