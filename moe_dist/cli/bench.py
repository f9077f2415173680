"""`moe-dist bench`: measurements of parts of the system on this machine."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.bench_domains import bench_domains
from moe_dist.cli.bench_growth import bench_growth
from moe_dist.cli.bench_layer import bench_layer
from moe_dist.cli.bench_memory import bench_memory
from moe_dist.cli.bench_offload import bench_offload
from moe_dist.cli.bench_precision import bench_precision
from moe_dist.cli.bench_recluster import bench_recluster
from moe_dist.cli.bench_step import bench_step
from moe_dist.cli.groups import CommandGroup
from moe_dist.cli.options import FinishedRuns, Jobs, Json, Overrides, RecipeFolder, Seeds
from moe_dist.console import wide_console
from moe_dist.errors import LaunchError
from moe_dist.metrics import write_json


def register(app: typer.Typer) -> None:
    """Add the group `bench` and its commands."""
    bench = typer.Typer(cls=CommandGroup, help="Measure parts of the system on this machine.")
    bench.command("layer")(bench_layer)
    bench.command("growth")(bench_growth)
    bench.command("quality")(bench_quality)
    bench.command("domains")(bench_domains)
    bench.command("precision")(bench_precision)
    bench.command("recluster")(bench_recluster)
    bench.command("step")(bench_step)
    bench.command("memory")(bench_memory)
    bench.command("offload")(bench_offload)
    app.add_typer(bench, name="bench")


def bench_quality(
    overrides: Overrides = None,
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=TRAIN,VALIDATION", help="Train on these files; repeatable."),
    ] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe to run; may be given again. Default: all.")] = None,
    stdlib: Annotated[
        bool, typer.Option("--stdlib/--no-stdlib", help="Train on the source code of Python's standard library.")
    ] = True,
    equal_time: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Train every recipe for the time of this one instead of equal tokens."),
    ] = None,
    seeds: Seeds = 3,
    jobs: Jobs = 2,
    configs: RecipeFolder = Path("configs/experiment"),
    folder: FinishedRuns = Path("results/quality"),
    json_file: Json = None,
) -> None:
    """Train clustered experts and their baselines on the same text and compare losses; finished runs are kept."""
    from moe_dist.studies import quality
    from moe_dist.studies.equal_time import steps_for_equal_time
    from moe_dist.studies.runner import require_all, run_cells, validation_loss

    console = wide_console()
    corpora = {"stdlib": ["corpus.kind=stdlib"]} if stdlib else {}
    corpora |= dict(_text_corpus(word) for word in text or ())
    if not corpora:
        raise LaunchError("--no-stdlib: leaves no text to train on; give --text NAME=TRAIN,VALIDATION")
    todo = quality.cells(configs, corpora, seeds, recipe or quality.RECIPES, overrides or ())
    if equal_time is not None:
        todo = steps_for_equal_time(todo, equal_time, folder / "speed", jobs, console.print)
    outcomes = run_cells(todo, folder, console.print, validation_loss, jobs=jobs)
    results = {outcome.cell: outcome.summary for outcome in outcomes if outcome.summary}
    quality.render(results, console)
    if json_file is not None:
        write_json(Path(json_file), quality.to_dict(results))
    require_all(outcomes)


def _text_corpus(word: str) -> tuple[str, list[str]]:
    """Parse `NAME=TRAIN,VALIDATION` into a name and the overrides that select these files."""
    name, equals, files = word.partition("=")
    train, comma, validation = files.partition(",")
    if not (name and equals and train and comma and validation):
        raise LaunchError(f"--text {word!r}: write NAME=TRAIN,VALIDATION, such as wikitext=train.txt,validation.txt")
    paths = (
        (key, json.dumps([str(Path(file).absolute())]))
        for key, file in (("paths", train), ("validation_paths", validation))
    )
    return name, ["corpus.kind=text", *(f"corpus.{key}={value}" for key, value in paths)]
