"""`moe-dist bench layer`: one layer against its baselines, in this process or on ranks."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_dist.benchmarks.layer.spec import LayerShape, RanksBenchSpec
from moe_dist.cli.words import Clusters, ExpertWidth, Hostfile, Json, Port, Repeats, ResidualRank, Seed, Width
from moe_dist.console import wide_console
from moe_dist.errors import LaunchError
from moe_dist.launch import rank_bench as entry
from moe_dist.launch import runners
from moe_dist.launch.job import DEFAULT_PORT, Job, JobSize, Launcher, machines
from moe_dist.launch.rank import writable

ENTRY = Path(entry.__file__)
ON_RANKS = ("ranks", "peers", "wire_dtype", "overlap", "launcher", "hostfile", "port", "json_file")
SHAPE = ("tokens", "hidden", "expert_hidden", "experts", "clusters", "rank", "vectors", "backend", "wire_dtype", "seed")


def bench_layer(
    tokens: Annotated[int | None, typer.Option(help="Tokens in the batch; with --ranks, of a rank.")] = None,
    hidden: Width = None,
    expert_hidden: ExpertWidth = None,
    experts: Annotated[int | None, typer.Option(help="E: experts in the layer.")] = None,
    clusters: Clusters = None,
    rank: ResidualRank = None,
    top_k: Annotated[list[int] | None, typer.Option(help="k: experts a token; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Such as float32; may be given again.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads (of a rank). Default: 1.")] = None,
    repeats: Repeats = None,
    vectors: Annotated[bool | None, typer.Option(help="Per-expert vectors too.")] = None,
    backend: Annotated[str | None, typer.Option(help="How clustered experts are computed, as moe.backend.")] = None,
    also_backend: Annotated[list[str] | None, typer.Option(help="Another backend to show; may be given again.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda. Default: cpu. Not with --ranks.")] = None,
    seed: Seed = None,
    ranks: Annotated[int | None, typer.Option(help="Whole layers, with routers, on so many ranks.")] = None,
    peers: Annotated[str, typer.Option(help="With --ranks, others' layers too: deepspeed,megatron.")] = "",
    wire_dtype: Annotated[str | None, typer.Option(help="With --ranks, as moe.wire_dtype. Default: --dtype.")] = None,
    overlap: Annotated[
        list[str] | None,
        typer.Option(help="With --ranks, m=1 also as moe.overlap_chunks: auto, or a number; may be given again."),
    ] = None,
    launcher: Annotated[Launcher, typer.Option(help="Who starts the ranks.")] = Launcher.LOCAL,
    hostfile: Hostfile = None,
    port: Port = DEFAULT_PORT,
    json_file: Json = None,
) -> None:
    """Time the clustered layer against the standard one and the dense floor, forward and backward, side by side.

    Without --ranks: experts alone, in this process, on routing drawn beforehand. With --ranks: whole layers, with what
    crosses between the ranks counted, beside the MoE layers of DeepSpeed and Megatron-core if --peers names them.
    """
    options = {name: value for name, value in locals().items() if value is not None}
    for plural, name in (("top_k", "top_k"), ("dtypes", "dtype"), ("backends", "also_backend"), ("overlap", "overlap")):
        if given := options.pop(name, None):
            options[plural] = tuple(given)
    target = str(writable(json_file)) if json_file else None
    if ranks is None and hostfile is None:
        _in_this_process(options, target)
        return
    if also_backend:
        raise LaunchError("--also-backend does not go with --ranks: give --backend")
    if device:
        raise LaunchError("--device does not go with --ranks: world.backend decides there")
    job = Job(launcher, machines(launcher, JobSize(ranks=ranks, hostfile=hostfile), 1), (), threads or 1, ENTRY, port)
    raise typer.Exit(runners.launch(_job_with(job, options, target)))


def _in_this_process(options: dict[str, Any], target: str | None) -> None:
    for name in ("peers", "wire_dtype", "overlap"):
        if options.get(name):
            raise LaunchError(f"--{name.replace('_', '-')} needs --ranks")
    from moe_dist.benchmarks.layer import local as layer_bench
    from moe_dist.metrics import write_json

    given = {name: value for name, value in options.items() if name not in ON_RANKS}
    result = layer_bench.run_layer_bench(layer_bench.LayerBenchSpec(**given))
    layer_bench.render(result, wide_console())
    if target is not None:
        write_json(Path(target), result.to_dict())


def _job_with(job: Job, options: dict[str, Any], target: str | None) -> Job:
    """The job with its specification among its words, refused here if it cannot work."""
    shape = LayerShape(**{name: options[name] for name in SHAPE if name in options})
    own = {name: options[name] for name in ("top_k", "dtypes", "repeats", "overlap") if name in options}
    peers = tuple(word for word in options["peers"].split(",") if word)
    spec = RanksBenchSpec(shape, peers=peers, json_file=target, **own)
    spec.check(job.ranks)
    return replace(job, words=("layer", json.dumps(asdict(spec)), f"world.threads={job.threads}"))
