"""`moe-dist measure`: what really crosses between ranks, under any moe_dist.launch."""

import os
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.words import Config, Hostfile, Json, Nodes, Overrides, Port, Ranks, RanksPerNode, StartedBy
from moe_dist.launch import environment, runners
from moe_dist.launch import rank_measure as measure
from moe_dist.launch.job import DEFAULT_PORT, JobSize, Launcher, plan
from moe_dist.launch.rank import writable

ENTRY = Path(measure.__file__)


class LayerKind(StrEnum):
    """As `moe.kind`; deepspeed and megatron: their own MoE layers, alone, on random tokens."""

    CLUSTERED = "clustered"
    STANDARD = "standard"
    DENSE = "dense"
    DEEPSPEED = "deepspeed"
    MEGATRON = "megatron"


def register(app: typer.Typer) -> None:
    """Adds the group `measure` and its commands."""
    group = typer.Typer(help="Measure runs on several ranks.")
    group.callback()(_group)  # a group with one command would else be that command
    group.command("traffic")(traffic)
    app.add_typer(group, name="measure")


def _group() -> None:
    pass


def traffic(
    config: Config,
    overrides: Overrides = None,
    kind: Annotated[
        list[LayerKind] | None, typer.Option(help="A kind of layer; may be given again. Default: own and standard.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are counted, and as many that are timed.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before.")] = 2,
    profile: Annotated[bool, typer.Option("--profile", help="Also where the time goes, and a trace.")] = False,
    launcher: StartedBy = Launcher.LOCAL,
    ranks: Ranks = None,
    nodes: Nodes = None,
    ranks_per_node: RanksPerNode = None,
    hostfile: Hostfile = None,
    port: Port = DEFAULT_PORT,
    json_file: Json = None,
) -> None:
    """Train a few steps and tell the all-to-all's bytes: by payload, stage, link and pair of ranks, beside the least.

    As one rank inside a launcher (mpirun, srun, torchrun, deepspeed) this process measures as that rank.
    """
    target = writable(json_file) if json_file else None
    options = measure.TrafficOptions(tuple(kind or ()), steps, warmup, profile, target)
    if environment.discover(os.environ).kind != "alone":
        raise typer.Exit(measure.measure_rank(config, overrides or (), options))
    size = JobSize(ranks, nodes, ranks_per_node, hostfile)
    job = plan(launcher, size, config, overrides or (), port)
    job = replace(job, words=(*job.words, *options.words()), entry=ENTRY)
    raise typer.Exit(runners.launch(job))
