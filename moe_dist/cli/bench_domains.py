"""`moe-dist bench domains`: do clusters follow the domains of a text, and does it pay?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launcher.train import writable
from moe_dist.cli.words import Json, Overrides


def bench_domains(
    overrides: Overrides = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(help="A recipe to run; may be given again. The first is what others are held to."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, seeds 0 and on.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, of one thread each.")] = 2,
    characters: Annotated[int, typer.Option(min=10_000, help="Text of each domain.")] = 1_500_000,
    english: Annotated[Path | None, typer.Option(help="A text file; default: docstrings of the library.")] = None,
    configs: Annotated[Path, typer.Option(help="Folder of the quality-*.yaml files.")] = Path("configs/experiment"),
    folder: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = Path("results/domains"),
    json_file: Json = None,
) -> None:
    """Train on English, code, Cyrillic and tables at once: loss, and whether a cluster's experts serve one domain."""
    target = json_file and writable(json_file)
    from moe_dist.measurement import domains
    from moe_dist.metrics import write_json

    console = Console()
    spec = domains.DomainSpec(
        configs, folder, tuple(recipe or domains.RECIPES), seeds, jobs, characters, english, tuple(overrides or ())
    )
    runs = domains.run_domains(spec, console.print)
    domains.render(runs, console)
    if target is not None:
        write_json(Path(target), {"runs": [vars(run) for run in runs]})
