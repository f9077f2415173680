"""`moe-dist bench layer`: one layer against its baselines, in this process or on ranks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from moe_dist.benchmarks.layer.spec import LayerBenchSpec, RanksBenchSpec
from moe_dist.cli.options import Json, Port, StartedBy, build, takes
from moe_dist.console import wide_console
from moe_dist.errors import LaunchError
from moe_dist.launch import runners
from moe_dist.launch.job import DEFAULT_PORT, Job, JobSize, Launcher, machines
from moe_dist.launch.tasks import BENCH_LAYER
from moe_dist.metrics import write_json


@takes(given=(LayerBenchSpec, RanksBenchSpec), size=JobSize)
def bench_layer(
    given: dict[str, Any],
    size: JobSize,
    launcher: StartedBy = Launcher.LOCAL,
    port: Port = DEFAULT_PORT,
    json_file: Json = None,
) -> None:
    """Time the clustered layer against the standard one and the dense floor, forward and backward, side by side.

    Without --ranks: experts alone, in this process, on routing drawn beforehand. With --ranks: whole layers, with the
    bytes between ranks counted, beside the MoE layers of DeepSpeed and Megatron-core if --peers names them.
    """
    if size != JobSize():
        job = Job(launcher, machines(launcher, size, ranks_wanted=1), (), given.get("threads", 1), port=port)
        raise typer.Exit(runners.launch(_with_spec(job, given, json_file)))
    for name in ("peers", "wire_dtype", "overlap"):
        if name in given:
            raise LaunchError(f"--{name.replace('_', '-')} needs --ranks")
    from moe_dist.benchmarks.layer import local

    result = local.run_layer_bench(build(LayerBenchSpec, given))
    local.render(result, wide_console())
    if json_file is not None:
        write_json(Path(json_file), result.to_dict())


def _with_spec(job: Job, given: dict[str, Any], json_file: str | None) -> Job:
    if "backends" in given:
        raise LaunchError("--also-backend does not go with --ranks: give --backend")
    if "device" in given:
        raise LaunchError("--device does not go with --ranks: world.backend decides there")
    peers = tuple(peer for word in given.get("peers", ()) for peer in word.split(",") if peer)
    spec = replace(build(RanksBenchSpec, given), peers=peers, json_file=json_file)
    spec.check(job.ranks)
    return replace(job, words=(f"world.threads={job.threads}",)).with_task(BENCH_LAYER, spec)
