"""`moe-dist bench step`: whole training steps, and their parts."""

from dataclasses import replace

import typer

from moe_dist.benchmarks.step.spec import StepBenchSpec
from moe_dist.cli.options import Config, Json, Overrides, Port, StartedBy, takes
from moe_dist.config import load_config
from moe_dist.launch import runners
from moe_dist.launch.job import DEFAULT_PORT, JobSize, Launcher, plan
from moe_dist.launch.tasks import BENCH_STEP


@takes(size=JobSize, spec=StepBenchSpec)
def bench_step(
    config: Config,
    size: JobSize,
    spec: StepBenchSpec,
    overrides: Overrides = None,
    launcher: StartedBy = Launcher.LOCAL,
    port: Port = DEFAULT_PORT,
    json_file: Json = None,
) -> None:
    """Compare tokens/s of clustered and standard layers on one backbone, and divide the time of a step into parts."""
    spec.configs(load_config(config, overrides or ()))
    job = plan(launcher, size, config, overrides or (), port)
    raise typer.Exit(runners.launch(job.with_task(BENCH_STEP, replace(spec, json_file=json_file))))
