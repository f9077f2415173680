"""`moe-dist bench step`: whole training steps, and their parts."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.benchmarks.step.spec import StepBenchSpec
from moe_dist.cli.words import Config, Hostfile, Json, Overrides, Port, Ranks, StartedBy
from moe_dist.config import load_config
from moe_dist.launch import rank_bench as entry
from moe_dist.launch import runners
from moe_dist.launch.job import DEFAULT_PORT, JobSize, Launcher, plan
from moe_dist.launch.rank import writable

ENTRY = Path(entry.__file__)


def bench_step(
    config: Config,
    overrides: Overrides = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="A kind of layer; may be given again; the last is the yardstick.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of some steps of each kind.")] = StepBenchSpec.rounds,
    steps: Annotated[int, typer.Option(help="Steps of each kind in a round.")] = StepBenchSpec.steps,
    warmup: Annotated[int, typer.Option(help="Steps before.")] = StepBenchSpec.warmup,
    divided: Annotated[int, typer.Option(help="Steps whose time is divided over its parts.")] = StepBenchSpec.divided,
    launcher: StartedBy = Launcher.LOCAL,
    ranks: Ranks = None,
    hostfile: Hostfile = None,
    port: Port = DEFAULT_PORT,
    json_file: Json = None,
) -> None:
    """Tokens/s of clustered against standard layers on the same backbone, and where the time of a step goes."""
    target = str(writable(json_file)) if json_file else None
    spec = StepBenchSpec(tuple(kind or StepBenchSpec.kinds), rounds, steps, warmup, divided, target)
    spec.configs(load_config(config, overrides or ()))
    job = plan(launcher, JobSize(ranks=ranks, hostfile=hostfile), config, overrides or (), port)
    words = ("step", json.dumps(asdict(spec)), f"--config={config}", *(overrides or ()))
    raise typer.Exit(runners.launch(replace(job, words=words, entry=ENTRY)))
