"""Runner of all studies: runs the cells that a folder lacks, keeps their summaries, and collects the results."""

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moe_dist.benchmarks.subruns import Summary, read_summary, result_file, run_once
from moe_dist.config import RunConfig, load_config
from moe_dist.errors import MoeDistError


@dataclass(frozen=True)
class StudyCell:
    """One run of a study.

    Attributes:
        values: (axis, value) in the axes' order.
        refusal: reason why it cannot run; None: it can.
    """

    values: tuple[tuple[str, str], ...]
    ranks: int
    repeat: int
    config: Path
    overrides: tuple[str, ...]
    refusal: str | None = None

    @property
    def name(self) -> str:
        """Name made of the axes' values and the repeat, in characters that are safe in a file name."""
        words = [f"{axis.rpartition('.')[2]}-{value}" for axis, value in self.values]
        kept = "_".join(words) or "cell"
        return "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{kept}_{self.repeat}")

    def value(self, axis: str) -> str:
        """Return the value of one axis."""
        return dict(self.values)[axis]

    def load(self) -> RunConfig:
        """Load the run's configuration.

        Raises:
            ConfigError: these overrides are refused.
        """
        return load_config(self.config, self.overrides)

    def result_file(self, folder: Path) -> Path:
        """Return the file of its summary, by name, configuration and code; the name contains ranks and repeat."""
        return result_file(folder, f"r{self.ranks}_{self.name}", self.load())

    def run_name(self, folder: Path) -> str:
        """Return the name of its run; it depends on configuration and code, so that no wrong run is resumed."""
        return self.result_file(folder).stem

    def train_words(self, folder: Path) -> list[str]:
        """Return configuration, overrides and options of its training command, one word each."""
        own = [f"name={self.run_name(folder)}", f"runs_dir={json.dumps(str((folder / 'runs').absolute()))}"]
        return [str(self.config), *self.overrides, *own, "--json", str(self.result_file(folder).absolute())]


def speed(summary: Summary) -> str:
    """Return the speed of a run in words."""
    tokens = summary["tokens_per_second"]
    return "no speed" if tokens is None else f"{tokens:,.0f} tokens/s"


def validation_loss(summary: Summary) -> str:
    """Return the validation loss of a run in words."""
    return f"validation loss {summary['validation']['loss']:.4f}"


@dataclass(frozen=True)
class StudyOutcome:
    """Cell with its summary, or with the reason why there is none."""

    cell: StudyCell
    summary: Summary | None
    problem: str | None


def run_cells(
    cells: Sequence[StudyCell],
    folder: Path,
    say: Callable[[str], None],
    figure: Callable[[Summary], str],
    *,
    launcher: str = "local",
    seconds: float | None = None,
    jobs: int = 1,
) -> list[StudyOutcome]:
    """Run the missing cells, read finished ones, and continue after a failure.

    Args:
        say: receives one line per cell.
        figure: text of a summary in that line.
        launcher: launcher of the ranks, as `moe-dist launch --launcher`.
        seconds: time limit of one cell.
        jobs: cells at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def run(number: int, cell: StudyCell) -> StudyOutcome:
        outcome = finish(cell, folder, launcher, seconds)
        result = figure(outcome.summary) if outcome.summary else f"no result: {outcome.problem}"
        say(f"{number}/{len(cells)} {cell.name}: {result}")
        return outcome

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, range(1, len(cells) + 1), cells))


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
    if cell.refusal:
        return StudyOutcome(cell, None, cell.refusal)
    launch = [sys.executable, "-m", "moe_dist", "launch", "--launcher", launcher, "--ranks", str(cell.ranks)]
    return StudyOutcome(cell, *run_once(cell.result_file(folder), [*launch, *cell.train_words(folder)], seconds))


def require_all(outcomes: Sequence[StudyOutcome]) -> None:
    """Raise a MoeDistError that names the failed cells, if there are any."""
    if failed := [outcome.cell.name for outcome in outcomes if not outcome.summary and not outcome.cell.refusal]:
        raise MoeDistError(f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}")
