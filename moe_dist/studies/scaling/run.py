"""Runs what a study still lacks, and gathers what it has."""

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
    """A cell and its summary, or the reason why there is none."""

    cell: StudyCell
    summary: Summary | None
    problem: str | None


def train_words(cell: StudyCell, folder: Path) -> list[str]:
    """Configuration, overrides and options of the cell's training command, each a word."""
    own = [f"name={run_name(cell, folder)}", f"runs_dir={json.dumps(str((folder / 'runs').absolute()))}"]
    return [str(cell.config), *cell.overrides, *own, "--json", str(cell.result_file(folder).absolute())]


def run_name(cell: StudyCell, folder: Path) -> str:
    """Of the cell's run: another configuration and other code have another, so that nothing wrong is gone on with."""
    return cell.result_file(folder).stem


def run_study(
    cells: Sequence[StudyCell], folder: Path, launcher: str, seconds: float | None, say: Callable[[str], None]
) -> list[StudyOutcome]:
    """Runs cell after cell, each alone on the machine; a finished one is read, a failed one does not stop the others.

    Args:
        launcher: who starts the ranks, as `moe-dist launch --launcher`.
        seconds: the most that one cell may take.
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
    """What there is by now, nothing run."""
    return [known(cell, folder) or StudyOutcome(cell, None, "not run yet") for cell in cells]


def known(cell: StudyCell, folder: Path) -> StudyOutcome | None:
    """What there is of a cell without running it: its summary, or why it cannot run."""
    if cell.refusal:
        return StudyOutcome(cell, None, cell.refusal)
    summary = read_summary(cell.result_file(folder))
    return StudyOutcome(cell, summary, None) if summary else None


def finish(cell: StudyCell, folder: Path, launcher: str, seconds: float | None) -> StudyOutcome:
    """Runs one cell, or reads what an earlier run of it has left."""
    if outcome := known(cell, folder):
        return outcome
    command = [sys.executable, "-m", "moe_dist", "launch", "--launcher", launcher, "--ranks", str(cell.ranks)]
    problem = subruns.run([*command, *train_words(cell, folder)], seconds)
    summary = read_summary(cell.result_file(folder))
    return StudyOutcome(cell, summary, None if summary else problem or "it left no summary")
