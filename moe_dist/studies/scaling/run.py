"""Runner of a study: runs the missing cells and collects the results."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_dist.benchmarks import subruns
from moe_dist.benchmarks.subruns import Summary, read_summary
from moe_dist.studies.scaling.cells import StudyCell


@dataclass(frozen=True)
class StudyOutcome:
    """Cell with its summary, or with the reason why there is none."""

    cell: StudyCell
    summary: Summary | None
    problem: str | None


def train_words(cell: StudyCell, folder: Path) -> list[str]:
    """Return configuration, overrides and options of the cell's training command, one word each."""
    own = [f"name={run_name(cell, folder)}", f"runs_dir={json.dumps(str((folder / 'runs').absolute()))}"]
    return [str(cell.config), *cell.overrides, *own, "--json", str(cell.result_file(folder).absolute())]


def run_name(cell: StudyCell, folder: Path) -> str:
    """Return the name of the cell's run; it depends on configuration and code, so that no wrong run is resumed."""
    return cell.result_file(folder).stem


def run_study(
    cells: Sequence[StudyCell], folder: Path, launcher: str, seconds: float | None, say: Callable[[str], None]
) -> list[StudyOutcome]:
    """Run cell after cell, each alone on the machine; read finished ones, and continue after a failure.

    Args:
        launcher: launcher of the ranks, as `moe-dist launch --launcher`.
        seconds: time limit of one cell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for number, cell in enumerate(cells, 1):
        outcome = finish(cell, folder, launcher, seconds)
        outcomes.append(outcome)
        speed = outcome.summary["tokens_per_second"] if outcome.summary else None
        told = f"{speed:,.0f} tokens/s" if speed is not None else f"no result: {outcome.problem}"
        say(f"{number}/{len(cells)} {cell.name}: {told}")
    return outcomes


def gather(cells: Sequence[StudyCell], folder: Path) -> list[StudyOutcome]:
    """Return the available outcomes and run nothing."""
    return [known(cell, folder) or StudyOutcome(cell, None, "not run yet") for cell in cells]


def known(cell: StudyCell, folder: Path) -> StudyOutcome | None:
    """Return the outcome of a cell that has finished or cannot run; None otherwise."""
    if cell.refusal:
        return StudyOutcome(cell, None, cell.refusal)
    summary = read_summary(cell.result_file(folder))
    return StudyOutcome(cell, summary, None) if summary else None


def finish(cell: StudyCell, folder: Path, launcher: str, seconds: float | None) -> StudyOutcome:
    """Run one cell, or read its earlier summary."""
    if outcome := known(cell, folder):
        return outcome
    command = [sys.executable, "-m", "moe_dist", "launch", "--launcher", launcher, "--ranks", str(cell.ranks)]
    problem = subruns.run([*command, *train_words(cell, folder)], seconds)
    summary = read_summary(cell.result_file(folder))
    return StudyOutcome(cell, summary, None if summary else problem or "it left no summary")
