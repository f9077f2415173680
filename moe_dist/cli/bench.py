"""`moe-dist bench`: measurements of parts of the system on this machine."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launcher.train import writable
from moe_dist.cli.bench_memory import bench_memory
from moe_dist.cli.bench_recluster import bench_recluster
from moe_dist.cli.words import Json, Overrides
from moe_dist.errors import LaunchError


def register(app: typer.Typer) -> None:
    """Adds the group `bench` and its commands."""
    bench = typer.Typer(help="Measure parts of the system on this machine.")
    bench.callback()(_group)  # a group with one command would else be that command
    bench.command("layer")(bench_layer)
    bench.command("quality")(bench_quality)
    bench.command("recluster")(bench_recluster)
    bench.command("memory")(bench_memory)
    app.add_typer(bench, name="bench")


def _group() -> None:
    pass


def bench_layer(
    tokens: Annotated[int | None, typer.Option(help="Tokens in the batch.")] = None,
    hidden: Annotated[int | None, typer.Option(help="d: width of the model.")] = None,
    expert_hidden: Annotated[int | None, typer.Option(help="f: hidden width of an expert.")] = None,
    experts: Annotated[int | None, typer.Option(help="E: experts in the layer.")] = None,
    clusters: Annotated[int | None, typer.Option(help="G: clusters of experts.")] = None,
    rank: Annotated[int | None, typer.Option(help="r: rank of an expert's residual.")] = None,
    top_k: Annotated[list[int] | None, typer.Option(help="k: experts a token; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Such as float32; may be given again.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds; the median is reported.")] = None,
    vectors: Annotated[bool | None, typer.Option(help="Per-expert vectors too.")] = None,
    form: Annotated[str | None, typer.Option(help="How clustered experts are computed, as moe.form.")] = None,
    also_form: Annotated[list[str] | None, typer.Option(help="A further form to show; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights and tokens.")] = None,
    json_file: Json = None,
) -> None:
    """Time the clustered layer against the standard one and the dense floor, forward and backward, side by side."""
    given: dict[str, Any] = {
        "tokens": tokens,
        "hidden": hidden,
        "expert_hidden": expert_hidden,
        "experts": experts,
        "clusters": clusters,
        "rank": rank,
        "top_k": tuple(top_k) if top_k else None,
        "dtypes": tuple(dtype) if dtype else None,
        "threads": threads,
        "repeats": repeats,
        "vectors": vectors,
        "form": form,
        "forms": tuple(also_form) if also_form else None,
        "seed": seed,
    }
    target = json_file and writable(json_file)
    from moe_dist.measurement import layer_bench
    from moe_dist.metrics import write_json

    spec = layer_bench.LayerBenchSpec(**{name: value for name, value in given.items() if value is not None})
    result = layer_bench.run_layer_bench(spec)
    layer_bench.render(result, Console())
    if target is not None:
        write_json(Path(target), result.to_dict())


def bench_quality(
    overrides: Overrides = None,
    text: Annotated[
        list[str] | None, typer.Option(metavar="NAME=TRAIN,VALIDATION", help="Also on these files; may be given again.")
    ] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="A recipe to run; may be given again. Default: all.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, seeds 0 and on.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, of one thread each.")] = 2,
    configs: Annotated[Path, typer.Option(help="Folder of the quality-*.yaml files.")] = Path("configs/experiment"),
    folder: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = Path("results/quality"),
    json_file: Json = None,
) -> None:
    """Train clustered experts and their baselines on the same text and compare losses; finished runs are kept."""
    from moe_dist.measurement import quality
    from moe_dist.metrics import write_json

    target = json_file and writable(json_file)
    console = Console()
    corpora = {"stdlib": ["corpus.kind=stdlib"], **dict(_text_corpus(word) for word in text or ())}
    todo = quality.cells(configs, corpora, seeds, recipe or quality.RECIPES, overrides or ())
    results = quality.run_cells(todo, folder, jobs, console.print)
    quality.render(results, console)
    if target is not None:
        write_json(Path(target), quality.to_dict(results))
    quality.require_all(results, todo)


def _text_corpus(word: str) -> tuple[str, list[str]]:
    """`NAME=TRAIN,VALIDATION` as a name and the overrides that select these files."""
    name, equals, files = word.partition("=")
    train, comma, validation = files.partition(",")
    if not (name and equals and train and comma and validation):
        raise LaunchError(f"--text {word!r}: write NAME=TRAIN,VALIDATION, such as wikitext=train.txt,validation.txt")
    paths = (
        (key, json.dumps([str(Path(file).absolute())]))
        for key, file in (("paths", train), ("validation_paths", validation))
    )
    return name, ["corpus.kind=text", *(f"corpus.{key}={value}" for key, value in paths)]
