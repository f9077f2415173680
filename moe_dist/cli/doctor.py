"""`moe-dist doctor`: checks of an environment before hours are lost in it."""

import os
from typing import Annotated

import typer

from moe_dist.cli.options import Overrides, Port, StartedBy, takes
from moe_dist.launch import environment, runners
from moe_dist.launch.job import DEFAULT_PORT, Job, JobSize, Launcher, machines, plan
from moe_dist.launch.rank import run_rank
from moe_dist.launch.tasks import DOCTOR


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(doctor)


@takes(size=JobSize)
def doctor(
    size: JobSize,
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="YAML file of a run to be started.")] = None,
    overrides: Overrides = None,
    launcher: StartedBy = Launcher.LOCAL,
    port: Port = DEFAULT_PORT,
) -> None:
    """Check versions, devices, links between all ranks, shared files, clocks, memory and disk: one line each.

    Inside a launcher (srun, mpirun, torchrun, deepspeed) this process is one of the ranks; without CONFIG and --ranks
    there are two. Exit code 1: a check failed.
    """
    if environment.discover(os.environ).kind != "alone":
        raise typer.Exit(run_rank(config, overrides or (), DOCTOR))
    if config is None:
        job = Job(launcher, machines(launcher, size, ranks_wanted=2), (), port=port)
    else:
        job = plan(launcher, size, config, overrides or (), port, starts=False)
    raise typer.Exit(runners.launch(job.with_task(DOCTOR)))
