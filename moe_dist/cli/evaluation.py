"""`moe-dist eval`: what a trained model is worth, on any number of ranks."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.cli.words import Hostfile, Json, Nodes, Port, Ranks, RanksPerNode, StartedBy
from moe_dist.config import load_config
from moe_dist.errors import LaunchError
from moe_dist.launch import environment, runners
from moe_dist.launch import rank_evaluate as evaluate
from moe_dist.launch.job import DEFAULT_PORT, Job, JobSize, Launcher, machines
from moe_dist.launch.rank import require_run, writable

ENTRY = Path(evaluate.__file__)


class TextSplit(StrEnum):
    """Of WikiText."""

    VALIDATION = "validation"
    TEST = "test"


class EvalDtype(StrEnum):
    """What the model is evaluated in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def register(app: typer.Typer) -> None:
    """Adds the command of this file."""
    app.command("eval")(evaluation)


def evaluation(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, such as runs/demo, or a checkpoint.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=value", help="world, memory: how this job's ranks work."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="wikitext, glue or glue:cola,sst2; may be given again. Default: wikitext."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="File or folder of the text; default: WikiText from the hub.")
    ] = None,
    split: Annotated[TextSplit, typer.Option(help="Of the text.")] = TextSplit.VALIDATION,
    subset: Annotated[str, typer.Option(help="Of WikiText on the hub.")] = evaluate.EvalOptions.subset,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens a window predicts; default: as long as trained.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows' starts; default: half a window.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows that a rank holds at once.")] = 8,
    glue: Annotated[
        Path | None, typer.Option(help="Folder with TASK/train.jsonl and TASK/validation.jsonl; default: the hub.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Fine-tunings of each task.")] = 3,
    epochs: Annotated[float, typer.Option(min=0.0, help="Of fine-tuning on each task.")] = 3.0,
    glue_batch: Annotated[int, typer.Option(min=1, help="Sentences a step of fine-tuning, over all ranks.")] = 32,
    learning_rate: Annotated[
        float | None, typer.Option(min=0.0, help="Of fine-tuning; default: a quarter of the run's.")
    ] = None,
    max_train: Annotated[int | None, typer.Option(min=1, help="Rows a task is learnt from, at most.")] = None,
    max_eval: Annotated[int | None, typer.Option(min=1, help="Rows a task is scored on, at most.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Steps of fine-tuning, at most.")] = None,
    dtype: Annotated[
        EvalDtype, typer.Option(help="float32 gives the same figure on any number of ranks.")
    ] = EvalDtype.FLOAT32,
    launcher: StartedBy = Launcher.LOCAL,
    ranks: Ranks = None,
    nodes: Nodes = None,
    ranks_per_node: RanksPerNode = None,
    hostfile: Hostfile = None,
    port: Port = DEFAULT_PORT,
    json_file: Json = None,
) -> None:
    """Evaluate a trained model: perplexity on WikiText, and GLUE after fine-tuning on each task.

    Without --ranks one process does it; inside a launcher (srun, mpirun, torchrun, deepspeed) this is one of the ranks.
    """
    options = evaluate.EvalOptions(
        tasks=evaluate.parse_tasks(task or ["wikitext"]),
        text=None if text is None else str(text.absolute()),
        split=split.value,
        subset=subset,
        window=window,
        stride=stride,
        batch=batch,
        dtype=dtype.value,
        json_file=None if json_file is None else writable(json_file),
        glue=None if glue is None else str(glue.absolute()),
        seeds=seeds,
        epochs=epochs,
        glue_batch=glue_batch,
        learning_rate=learning_rate,
        max_train=max_train,
        max_eval=max_eval,
        max_steps=max_steps,
    )
    words, size = evaluate.only_of_the_job(overrides or ()), JobSize(ranks, nodes, ranks_per_node, hostfile)
    if environment.discover(os.environ).kind != "alone" or (size == JobSize(ranks=ranks) and ranks in (None, 1)):
        require_run(run)
        raise typer.Exit(evaluate.evaluate_rank(str(run), words, options))
    if launcher is Launcher.SLURM:
        raise LaunchError("--launcher slurm: submit `sbatch slurm/eval.sbatch RUN ...`, or call srun on this command")
    require_run(run)
    threads = load_config(None, words).world.threads
    started = (str(run.absolute()), *words, *options.words())
    job = Job(launcher, machines(launcher, size, ranks_wanted=1), started, threads, ENTRY, port)
    raise typer.Exit(runners.launch(job))
