"""`moe-dist eval`: quality of a trained model, on any number of ranks."""

import os
from typing import Annotated, Any

import typer

from moe_dist.cli.options import Json, Port, StartedBy, TrainedRun, takes
from moe_dist.config import load_config
from moe_dist.errors import LaunchError
from moe_dist.evaluation.spec import HARNESS as HARNESS_TASKS
from moe_dist.evaluation.spec import HELD_OUT, EvalSpec, parse_tasks, split_overrides
from moe_dist.launch import environment, runners
from moe_dist.launch.files import require_run
from moe_dist.launch.job import DEFAULT_PORT, Job, JobSize, Launcher, machines
from moe_dist.launch.rank import run_rank
from moe_dist.launch.tasks import EVALUATE, HARNESS


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command("eval")(evaluation)


@takes(size=JobSize, given=(EvalSpec,))
def evaluation(
    run: TrainedRun,
    size: JobSize,
    given: dict[str, Any],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=value", help="Settings of this job; sections: world, memory."),
    ] = None,
    launcher: StartedBy = Launcher.LOCAL,
    port: Port = DEFAULT_PORT,
    json_file: Json = None,
) -> None:
    """Evaluate a trained model: perplexity of its held-out text or of WikiText, GLUE, tasks of lm-eval.

    Without --ranks this process is the only rank; inside a launcher (srun, mpirun, torchrun, deepspeed) it is one of
    the ranks.
    """
    world, memory = split_overrides(overrides or ())
    tasks = parse_tasks(given.pop("tasks", ("wikitext" if "text" in given else HELD_OUT,)))
    spec = EvalSpec(run.absolute(), tasks, **given, memory=memory, json_file=json_file)
    task = HARNESS if any(name.startswith(HARNESS_TASKS) for name in tasks) else EVALUATE
    alone = size == JobSize(ranks=size.ranks) and size.ranks in (None, 1)
    if alone or environment.discover(os.environ).kind != "alone":
        require_run(run)
        raise typer.Exit(run_rank(None, world, task, spec))
    if launcher is Launcher.SLURM:
        raise LaunchError("--launcher slurm: submit `sbatch slurm/eval.sbatch RUN ...`, or call srun on this command")
    require_run(run)
    threads = load_config(None, world).world.threads
    job = Job(launcher, machines(launcher, size, ranks_wanted=1), tuple(world), threads, port=port)
    raise typer.Exit(runners.launch(job.with_task(task, spec)))
