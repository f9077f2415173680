"""`moe-dist study`: the same training over a grid of ranks and settings."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.options import Config, Json, Overrides
from moe_dist.console import wide_console
from moe_dist.metrics import write_json


class StudyMode(StrEnum):
    """Quantity that stays constant as ranks are added."""

    STRONG = "strong"
    WEAK = "weak"


class StudyLauncher(StrEnum):
    """Program that starts the ranks of a cell."""

    LOCAL = "local"
    DEEPSPEED = "deepspeed"
    TORCHRUN = "torchrun"
    SLURM = "slurm"


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(study)


def study(
    config: Config,
    overrides: Overrides = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V,V", help="ranks=1,2,4 or any key, such as moe.experts=16,32; may be given again."),
    ] = None,
    mode: Annotated[
        StudyMode, typer.Option(help="strong: the same global batch; weak: the same batch per rank.")
    ] = StudyMode.STRONG,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each cell.")] = 3,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of each cell without an axis of ranks.")] = 1,
    launcher: Annotated[
        StudyLauncher, typer.Option(help="Program that starts the ranks; slurm writes job arrays.")
    ] = StudyLauncher.LOCAL,
    limit: Annotated[float | None, typer.Option(help="Time limit of one cell, seconds.")] = None,
    folder: Annotated[Path, typer.Option(help="Folder of finished cells and results.")] = Path("results/study"),
    json_file: Json = None,
) -> None:
    """Run every combination of the axes, repeatedly: speed, efficiency, bytes, memory. Finished cells are kept."""
    from moe_dist.studies import runner
    from moe_dist.studies.scaling import cells, plots, slurm, tables

    console = wide_console()
    axes = [cells.parse_axis(word) for word in axis or ()]
    todo = cells.build_cells(Path(config), axes, cells.Mode(mode), repeats, ranks, overrides or ())
    folder.mkdir(parents=True, exist_ok=True)
    if launcher is StudyLauncher.SLURM:
        _write_arrays(slurm.array_jobs(todo, folder), folder)
        outcomes = runner.gather(todo, folder)
    else:
        outcomes = runner.run_cells(
            todo,
            folder,
            typer.echo,
            runner.speed,
            launcher=launcher.value,
            seconds=limit,
        )
    rows = tables.rows(outcomes)
    tables.render(rows, console)
    tables.write_csv(outcomes, rows, folder)
    plots.plot(rows, folder / "study.png")
    typer.echo(f"{folder}/: cells.csv, table.csv, study.png")
    if json_file is not None:
        write_json(Path(json_file), tables.to_dict(rows))
    if launcher is not StudyLauncher.SLURM:
        runner.require_all(outcomes)


def _write_arrays(jobs: dict[str, str], folder: Path) -> None:
    for name, text in jobs.items():
        (folder / name).write_text(text, encoding="utf-8")
        typer.echo(f"sbatch {folder / name}")
    if jobs:
        typer.echo("Submit these, then run this command again for the results.")
