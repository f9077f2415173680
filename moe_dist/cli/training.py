"""Commands that train, start ranks, and check a configuration."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.cli.options import Config, ConfigOrText, Json, Overrides, OwnText, Port, StartedBy, takes
from moe_dist.cli.own_text import with_text
from moe_dist.config import dump_config, load_config, resolve_batch, resolve_world, with_sizes
from moe_dist.distillation.spec import StoreSpec
from moe_dist.errors import EXIT_REFUSED
from moe_dist.launch import environment, runners
from moe_dist.launch.environment import split_words
from moe_dist.launch.files import new_folder_name, with_summary
from moe_dist.launch.job import DEFAULT_PORT, JobSize, Launcher, plan
from moe_dist.launch.preflight import problems
from moe_dist.launch.rank import run_rank
from moe_dist.launch.tasks import STORE_LOGITS


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(train)
    app.command()(launch)
    app.command("config")(show_config)
    app.command("store-logits")(store_logits)


def train(
    config: ConfigOrText = None, overrides: Overrides = None, text: OwnText = None, json_file: Json = None
) -> None:
    """Train: one process alone, or as one rank inside a launcher (deepspeed, torchrun, mpirun, srun)."""
    _keep_command()
    path, words = with_text(text, config, overrides)
    raise typer.Exit(run_rank(path, with_summary(words, json_file)))


@takes(size=JobSize)
def launch(
    size: JobSize,
    config: ConfigOrText = None,
    overrides: Overrides = None,
    text: OwnText = None,
    launcher: StartedBy = Launcher.DEEPSPEED,
    port: Port = DEFAULT_PORT,
    launcher_args: Annotated[str, typer.Option(help="Further arguments of the launcher: '--partition=gpu'.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the command and start nothing.")] = False,
    json_file: Json = None,
) -> None:
    """Start ranks here or on several machines; when one fails all stop, and the last line names it and its error."""
    path, words = with_text(text, config, overrides, size.ranks or (size.nodes or 1) * (size.ranks_per_node or 1))
    job = plan(
        launcher, size, path, with_summary(words, json_file), port, split_words("--launcher-args", launcher_args)
    )
    if dry_run:
        typer.echo(runners.dry_run(job))
        return
    _keep_command()
    if job.launcher is not Launcher.SLURM:
        typer.echo(f"starting {job.ranks} rank(s) by {job.launcher}: their first lines follow in some seconds")
    raise typer.Exit(runners.launch(job))


@takes(size=JobSize, given=(StoreSpec,))
def store_logits(
    config: Config,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FOLDER", help="New folder to write.")],
    size: JobSize,
    given: dict[str, Any],
    overrides: Overrides = None,
    launcher: StartedBy = Launcher.LOCAL,
    port: Port = DEFAULT_PORT,
) -> None:
    """Store what distill.teacher predicts for the text of CONFIG, so that training needs no teacher in memory.

    Inside a launcher (mpirun, srun, torchrun, deepspeed) this process is one of the ranks.
    """
    inside = environment.discover(os.environ).kind != "alone"
    spec = StoreSpec(str(output.absolute() if inside else new_folder_name(output)), **given)
    if inside:
        raise typer.Exit(run_rank(config, overrides or (), STORE_LOGITS, spec))
    job = plan(launcher, size, config, overrides or (), port)
    raise typer.Exit(runners.launch(job.with_task(STORE_LOGITS, spec)))


def _keep_command() -> None:
    """Hand the command line to the ranks, which name it when they stop early."""
    os.environ[environment.COMMAND] = shlex.join(["moe-dist", *sys.argv[1:]])


def show_config(
    config: ConfigOrText = None,
    overrides: Overrides = None,
    text: OwnText = None,
    ranks: Annotated[int | None, typer.Option(help="Also check that this many ranks can run it.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="List what the run lacks on this machine, instead of printing YAML.")
    ] = False,
) -> None:
    """Check a configuration and print it resolved, as YAML; with --check also files, folders, space and devices."""
    path, words = with_text(text, config, overrides, ranks or 1)
    resolved = load_config(path, words)
    if ranks is not None:
        resolved = with_sizes(resolved, ranks)
        resolve_batch(resolved, ranks)
    if not check:
        typer.echo(dump_config(resolved), nl=False)
        return
    found = problems(resolved, None if "SLURM_JOB_ID" in os.environ else ranks or 1)  # its ranks are on other nodes
    typer.echo("\n".join(found) or f"{path}: ready to start")
    if ranks is not None and resolved.moe.layer_kind.clustered:
        from moe_dist.dispatch.layout_advice import layout_advice  # imports torch

        if (advice := layout_advice(resolved, resolve_world(resolved, ranks))) is not None:
            typer.echo(f"warning: {advice}")
    raise typer.Exit(EXIT_REFUSED if found else 0)
