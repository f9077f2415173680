"""`moe-dist measure`: bytes between ranks, under any launcher."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from moe_dist.benchmarks.traffic.spec import TrafficSpec
from moe_dist.cli.groups import CommandGroup
from moe_dist.cli.options import Config, Json, Overrides, Port, StartedBy, takes
from moe_dist.console import wide_console
from moe_dist.errors import ConfigError
from moe_dist.launch import environment, runners
from moe_dist.launch.job import DEFAULT_PORT, JobSize, Launcher, plan
from moe_dist.launch.rank import run_rank
from moe_dist.launch.tasks import TRAFFIC

if TYPE_CHECKING:
    from moe_dist.benchmarks.attach.attach import CountedCalls


def register(app: typer.Typer) -> None:
    """Add the group `measure` and its commands."""
    group = typer.Typer(cls=CommandGroup, help="Measure runs on several ranks.")
    group.callback()(lambda: None)  # a group with one command would else be that command
    group.command("traffic")(traffic)
    group.command("attach")(attach)
    group.command("routing")(routing)
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


def attach(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="A torch program, and its launcher.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of the table, those with the most bytes.")] = 20,
    json_file: Json = None,
) -> None:
    """Run any torch program, and count its collectives: bytes, calls and time by group, line, pass and kind of link.

    Nothing in the program is changed. Its exit status is passed on.
    """
    from moe_dist.benchmarks.attach.attach import run_attached

    found = run_attached(command)
    console = wide_console()
    console.print(_calls_table(found.calls[:rows], found.ranks))
    sent, away = (sum(getattr(one, name) for one in found.calls) for name in ("sent", "between_nodes"))
    more = f"; {len(found.calls) - rows} more lines are not shown" if len(found.calls) > rows else ""
    total = f"{found.ranks} ranks sent {sent:,.0f} bytes, of that {away:,.0f} between nodes{more}"
    console.print(total, highlight=False)
    if json_file is not None:
        figures = {"ranks": found.ranks, "calls": [asdict(one) for one in found.calls]}
        Path(json_file).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(found.status)


def routing(
    run: Annotated[Path, typer.Argument(help="Folder of a trained run.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File of the record, .npz.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text that is routed.")],
    layer: Annotated[int, typer.Option(help="Layer of experts; negative: from the last.")] = -1,
) -> None:
    """Record which experts the tokens of a text choose in a trained model, for `bench layer --routing`."""
    from moe_dist.benchmarks.layer.recorded_routing import record_routing

    record = record_routing(run, text, layer)
    try:
        record.write(output)
    except OSError as error:
        raise ConfigError(f"-o {output}: {error.strerror}") from error
    loads, (tokens, chosen) = record.loads(), record.expert_TC.shape
    busiest = max(loads) * len(loads) / sum(loads)
    typer.echo(f"{output}: {tokens:,} tokens, {record.facts['kind']}, {chosen} of {len(loads)} experts each")
    typer.echo(f"the busiest expert has {busiest:.2f} times the mean")


def _calls_table(calls: Sequence["CountedCalls"], ranks: int) -> Table:
    table = Table(box=None, pad_edge=False)
    names = ("collective", "group", "nodes", "pass", "calls a rank", "MB sent a rank", "between nodes", "s a rank")
    for name in (*names, "line"):
        table.add_column(name, justify="left" if name in ("collective", "pass", "line") else "right", overflow="fold")
    for one in calls:
        away = f"{one.between_nodes / one.sent:.0%}" if one.sent else ""
        table.add_row(
            one.operation,
            str(one.size),
            str(one.nodes),
            "backward" if one.backward else "forward",
            f"{one.calls / one.ranks:,.0f}",
            f"{one.sent / ranks / 1e6:,.3f}",
            away,
            f"{one.seconds / one.ranks:,.2f}",
            one.site,
        )
    return table
