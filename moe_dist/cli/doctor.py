"""`moe-dist doctor`: checks an environment before hours are lost in it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.words import Hostfile, Nodes, Overrides, Port, Ranks, RanksPerNode, StartedBy
from moe_dist.launch import environment, runners
from moe_dist.launch import rank_doctor as entry
from moe_dist.launch.job import DEFAULT_PORT, Job, JobSize, Launcher, machines, plan

ENTRY = Path(entry.__file__)


def register(app: typer.Typer) -> None:
    """Adds the command of this file."""
    app.command()(doctor)


def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="YAML file of a run to be started.")] = None,
    overrides: Overrides = None,
    launcher: StartedBy = Launcher.LOCAL,
    ranks: Ranks = None,
    nodes: Nodes = None,
    ranks_per_node: RanksPerNode = None,
    hostfile: Hostfile = None,
    port: Port = DEFAULT_PORT,
) -> None:
    """Check versions, devices, links between all ranks, shared files, clocks, memory and disk: one line each.

    Inside a launcher (srun, mpirun, torchrun, deepspeed) this process is one of the ranks; without CONFIG and --ranks
    there are two. Exit code 1: a check failed.
    """
    if environment.discover(os.environ).kind != "alone":
        raise typer.Exit(entry.examine_rank(config, overrides or ()))
    size = JobSize(ranks, nodes, ranks_per_node, hostfile)
    if config is None:
        job = Job(launcher, machines(launcher, size, ranks_wanted=2), (), port=port)
    else:
        job = plan(launcher, size, config, overrides or (), port)
    raise typer.Exit(runners.launch(replace(job, entry=ENTRY)))
