"""`moe-dist bench domains`: agreement of clusters with the domains of a text, and its effect on the loss."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.options import FinishedRuns, Jobs, Json, Overrides, RecipeFolder, Seeds
from moe_dist.console import wide_console
from moe_dist.metrics import write_json


def bench_domains(
    overrides: Overrides = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="A recipe to run; may be given again. The first is the baseline."),
    ] = None,
    seeds: Seeds = 3,
    jobs: Jobs = 2,
    characters: Annotated[int, typer.Option(min=10_000, help="Characters per domain.")] = 1_500_000,
    english: Annotated[Path | None, typer.Option(help="A text file; default: docstrings of the library.")] = None,
    configs: RecipeFolder = Path("configs/experiment"),
    folder: FinishedRuns = Path("results/domains"),
    json_file: Json = None,
) -> None:
    """Train on English, code, Cyrillic and tables at once: loss, and agreement of clusters with domains."""
    from moe_dist.studies import domains

    console = wide_console()
    spec = domains.DomainSpec(
        configs, folder, tuple(recipe or domains.RECIPES), seeds, jobs, characters, english, tuple(overrides or ())
    )
    runs = domains.run_domains(spec, console.print)
    domains.render(runs, console)
    if json_file is not None:
        write_json(Path(json_file), {"runs": [vars(run) for run in runs]})
