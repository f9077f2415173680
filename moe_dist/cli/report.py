"""`moe-dist report`: one page about runs."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.launch.files import writable


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(report)


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, such as runs/demo.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML page that compares runs; of broken runs it shows the readable part."""
    from moe_dist.report import read_runs, write_report

    writable(output, "--output")
    write_report(read_runs(runs), output)
    typer.echo(f"{output}: {len(runs)} run(s)")
