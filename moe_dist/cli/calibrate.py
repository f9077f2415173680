"""`moe-dist calibrate`: fit of the constants of `plan` and `simulate` to measured steps."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.options import Json
from moe_dist.console import wide_console
from moe_dist.launch.files import writable
from moe_dist.metrics import write_json


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(calibrate)


def calibrate(
    cases: Annotated[Path, typer.Argument(metavar="CASES", help="JSON: a machine to start from, and measurements.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the machine here, for --calibration of the others.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Fit the simulator to folders of `measure traffic`, and show how well it predicts the held-out ones."""
    machine_file = writable(output, "--output") if output else None
    from moe_dist.simulator import calibration
    from moe_dist.simulator import tables as view

    found = calibration.calibrate(cases)
    view.render_calibration(found, wide_console())
    if machine_file is not None:
        write_json(Path(machine_file), found.machine.model_dump(mode="json"))
    if json_file is not None:
        write_json(Path(json_file), calibration.to_dict(found))
