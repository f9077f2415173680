"""The `moe-dist` command. Imports no torch: help and refusals come at once, each command loads what it needs."""

import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from launcher import runners
from launcher.train import run_rank, with_json, writable
from moe_dist import __version__
from moe_dist.config import dump_config, load_config, resolve_batch, resolve_world
from moe_dist.errors import EXIT_FAILURE, EXIT_REFUSED, LaunchError, MoeDistError

EXIT_INTERRUPTED = 130
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or that of the click inside typer

app = typer.Typer(
    help="Train Mixture-of-Experts language models with clustered, compressed experts.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
bench = typer.Typer(help="Measure parts of the system on this machine.")
app.add_typer(bench, name="bench")

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file, such as configs/experiment/demo.yaml.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="key=value", help="Settings that win over CONFIG.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here, as JSON.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(config: Config, overrides: Overrides = None, json_file: Json = None) -> None:
    """Train: one process alone, or as one rank inside a launcher (deepspeed, torchrun, mpirun, srun)."""
    raise typer.Exit(run_rank(config, with_json(overrides or (), json_file)))


@app.command()
def launch(
    config: Config,
    overrides: Overrides = None,
    launcher: Annotated[runners.Launcher, typer.Option(help="Who starts the ranks.")] = runners.Launcher.DEEPSPEED,
    ranks: Annotated[int | None, typer.Option(help="How many; default: what the keys under `world` say.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the command and start nothing.")] = False,
    json_file: Json = None,
) -> None:
    """Start ranks on this machine and train; when one fails all stop, and the last line says which and why."""
    job = runners.plan(launcher, ranks, config, with_json(overrides or (), json_file))
    if dry_run:
        typer.echo(runners.dry_run(job))
        return
    raise typer.Exit(runners.launch(job))


@app.command("config")
def show_config(
    config: Config,
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(help="Also check that this many ranks can run it.")] = None,
) -> None:
    """Check a configuration and print it resolved, as YAML."""
    resolved = load_config(config, overrides or ())
    if ranks is not None:
        resolve_world(resolved, ranks)
        resolve_batch(resolved, ranks)
    typer.echo(dump_config(resolved), nl=False)


@bench.callback()
def _bench() -> None:
    pass


@bench.command("layer")
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


@bench.command("quality")
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


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: what a user did wrong is one line, only our own mistakes show a traceback."""
    sys.exit(_exit_code(arguments))


def _exit_code(arguments: list[str] | None) -> int:
    try:
        code = app(args=arguments, prog_name="moe-dist", standalone_mode=False)
    except UsageError as error:
        shown = getattr(error, "format_message", error.__str__)()
        return _complain(f"{' '.join(shown.split())} (moe-dist --help shows what there is)", EXIT_REFUSED)
    except MoeDistError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        return _complain(f"{type(error).__name__}: {error}", EXIT_FAILURE)
    return code if isinstance(code, int) else 0


def _complain(line: str, code: int) -> int:
    print(f"moe-dist: error: {line}", file=sys.stderr, flush=True)
    return code
