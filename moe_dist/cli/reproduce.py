"""`moe-dist reproduce`: the paper's table by one command."""

import shutil
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from moe_dist.cli.options import Json, Overrides
from moe_dist.console import wide_console


class ScaleName(StrEnum):
    """Scales of `studies/reproduction/scales.py`."""

    SMOKE = "smoke"
    TINY = "tiny"
    SMALL = "small"
    PARITY = "parity"
    PAPER = "paper"


class ReproduceLauncher(StrEnum):
    """Program that starts the ranks of a run."""

    LOCAL = "local"
    DEEPSPEED = "deepspeed"
    TORCHRUN = "torchrun"
    SLURM = "slurm"


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(reproduce)


def reproduce(
    overrides: Overrides = None,
    scale: Annotated[ScaleName, typer.Option(help="Scale; tiny takes 90 minutes on two cores.")] = ScaleName.TINY,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each kind.")] = 3,
    kind: Annotated[
        list[str] | None,
        typer.Option(help="A kind to run; may be given again; paper brings its baselines. Default: all."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="TRAIN,VALIDATION", help="Text: files, stdlib, packages or hub. Default: the scale's."),
    ] = None,
    test_text: Annotated[Path | None, typer.Option(help="File for perplexity; default: the validation file.")] = None,
    glue: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Folder of GLUE's data, hub, or none. Default: the scale's.")
    ] = None,
    grid: Annotated[
        bool | None, typer.Option("--grid/--no-grid", help="Search each kind's learning rate first.")
    ] = None,
    launcher: Annotated[
        ReproduceLauncher | None, typer.Option(help="slurm writes job arrays; default for paper. Else local.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at a time.")] = 1,
    limit: Annotated[float | None, typer.Option(help="Time limit of one training or evaluation, seconds.")] = None,
    configs: Annotated[Path, typer.Option(help="The folder configs of a checkout.")] = Path("configs"),
    folder: Annotated[
        Path | None, typer.Option(help="Folder of all results; default: results/reproduce-SCALE.")
    ] = None,
    gpu: Annotated[str, typer.Option(help="GPU of the predicted cost, as in moe-dist plan.")] = "h100",
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Machines, for the predicted cost and sbatch (paper). Default: 2.")
    ] = None,
    only_cost: Annotated[bool, typer.Option("--cost", help="Only predict the cost on GPUs.")] = False,
    json_file: Json = None,
) -> None:
    """Train and evaluate dense, standard and clustered models on equal tokens: table, plots, the paper's claims.

    Finished parts are kept and not run again; a failed part is reported, and the others continue.
    """
    from moe_dist.studies.reproduction import cells
    from moe_dist.studies.reproduction import evaluations as evaluate
    from moe_dist.studies.reproduction.scales import SCALES, chosen_kinds

    chosen, console = SCALES[scale.value], wide_console()
    kinds = chosen_kinds(kind or ())
    home = folder or Path("results") / f"reproduce-{chosen.name}"
    words = (*cells.text_words(text or chosen.text), *(overrides or ()))
    setting = cells.Setting(chosen, configs, home, words)
    subset = setting.load().corpus.subset
    from moe_dist.studies.reproduction import (
        job_arrays,  # here, since they load torch
        run,  # here, since they load torch
    )

    plan = run.ReproductionPlan(
        setting=setting,
        kinds=kinds,
        seeds=seeds,
        grid=bool(chosen.grid) and grid is not False,
        evaluations=evaluate.choose(chosen, text or chosen.text, test_text, glue, subset),
        launcher=(launcher or ReproduceLauncher.LOCAL).value,
        limit=limit,
        jobs=jobs,
    )
    home.mkdir(parents=True, exist_ok=True)
    nodes = nodes or min(2, chosen.ranks)
    if only_cost or scale is ScaleName.PAPER:
        job_arrays.show_cost(plan, gpu, nodes, console)
    if only_cost:
        return
    on_slurm = launcher is ReproduceLauncher.SLURM or (launcher is None and scale is ScaleName.PAPER)
    if on_slurm:
        job_arrays.write_arrays(plan, nodes, typer.echo, gpus=scale is ScaleName.PAPER)
    else:
        run.require_data(plan)
    results = run.gather(plan) if on_slurm else run.reproduce(plan, typer.echo)
    if on_slurm and not any(result.summary for result in results):
        return  # no results yet
    console.print(Markdown((home / "results.md").read_text(encoding="utf-8")))
    typer.echo(f"{home}/: results.md, {run.RESULTS}, runs.csv, *.png")
    if json_file is not None:
        shutil.copyfile(home / run.RESULTS, json_file)
    if not on_slurm:
        run.require_all(plan, results)
