"""`moe-dist measure`: bytes between ranks, under any launcher."""

import os
from dataclasses import replace

import typer

from moe_dist.benchmarks.traffic.spec import TrafficSpec
from moe_dist.cli.options import Config, Json, Overrides, Port, StartedBy, takes
from moe_dist.launch import environment, runners
from moe_dist.launch.job import DEFAULT_PORT, JobSize, Launcher, plan
from moe_dist.launch.rank import run_rank
from moe_dist.launch.tasks import TRAFFIC


def register(app: typer.Typer) -> None:
    """Add the group `measure` and its commands."""
    group = typer.Typer(help="Measure runs on several ranks.")
    group.callback()(lambda: None)  # a group with one command would else be that command
    group.command("traffic")(traffic)
    app.add_typer(group, name="measure")


@takes(size=JobSize, spec=TrafficSpec)
def traffic(
    config: Config,
    size: JobSize,
    spec: TrafficSpec,
    overrides: Overrides = None,
    launcher: StartedBy = Launcher.LOCAL,
    port: Port = DEFAULT_PORT,
    json_file: Json = None,
) -> None:
    """Train a few steps and count the all-to-all's bytes by payload, stage, link and pair of ranks, beside the least.

    Inside a launcher (mpirun, srun, torchrun, deepspeed) this process is one of the ranks.
    """
    spec = replace(spec, json_file=json_file)
    if environment.discover(os.environ).kind != "alone":
        raise typer.Exit(run_rank(config, overrides or (), TRAFFIC, spec))
    job = plan(launcher, size, config, overrides or (), port)
    raise typer.Exit(runners.launch(job.with_task(TRAFFIC, spec)))
