"""Evaluation of a cell's trained model by `moe-dist eval`, once; the figures are kept beside the cell's summary."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.benchmarks import subruns
from moe_dist.studies.reproduction.scales import Scale
from moe_dist.studies.runner import StudyCell

Figures = dict[str, Any]


@dataclass(frozen=True)
class Evaluations:
    """Selection of evaluations.

    Attributes:
        text: file of the text for perplexity, or `hub`; None: no perplexity.
        glue: folder of the data, or `hub`; None: no GLUE.
        subset: subset of WikiText on the hub.
    """

    text: str | None
    glue: str | None
    subset: str | None = None

    def words(self, scale: Scale) -> list[str]:
        """Return the options of `moe-dist eval`; empty: no evaluation."""
        words: list[str] = []
        if self.text is not None:
            words += ["--task=wikitext"] + ([f"--stride={scale.stride}"] if scale.stride else [])
            words += [f"--subset={self.subset}"] if self.text == "hub" and self.subset else []
            words += [] if self.text == "hub" else [f"--text={self.text}"]
        if self.glue is not None:
            words += ["--task=glue", "--seeds=1", *scale.glue] + ([] if self.glue == "hub" else [f"--glue={self.glue}"])
        return words


def choose(scale: Scale, text: str, test_text: Path | None, glue: str | None, subset: str | None) -> Evaluations:
    """Select evaluations by the options of `moe-dist reproduce`.

    Args:
        text: training text: `stdlib`, `packages`, `hub`, or TRAIN,VALIDATION.
        glue: folder, `hub` or `none`; None: the scale's default.
        subset: subset of WikiText if the text is the hub's.
    """
    own = {"stdlib": None, "packages": None, "hub": "hub"}
    held = own[text] if text in own else str(Path(text.partition(",")[2]).absolute())
    held = held if test_text is None else str(test_text.absolute())
    wanted = glue or ("hub" if scale.glue_by_default else "none")
    folder = None if wanted == "none" else "hub" if wanted == "hub" else str(Path(wanted).absolute())
    return Evaluations(held, folder, subset)


def result_file(cell: StudyCell, folder: Path, words: list[str]) -> Path:
    """Return the file of the figures; another training or other options have another file."""
    key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return folder / f"eval_{cell.run_name(folder)}-{key}.json"


def trained_run(cell: StudyCell, folder: Path) -> Path:
    """Return the folder of the cell's finished run; after an aborted start its name may have a suffix."""
    name, runs = cell.run_name(folder), folder / "runs"
    found = [path for path in runs.glob(f"{name}*") if (path / "summary.json").is_file()]
    return max(found, key=lambda path: (len(path.name), path.name), default=runs / name)


def command_words(cell: StudyCell, folder: Path, words: list[str]) -> list[str]:
    """Return the arguments of `moe-dist eval`."""
    target = result_file(cell, folder, words)
    return [str(trained_run(cell, folder).absolute()), "world.threads=1", *words, f"--json={target.absolute()}"]


def known(cell: StudyCell, folder: Path, words: list[str]) -> Figures | None:
    """Return the figures of an earlier evaluation; None without one."""
    return subruns.read_summary(result_file(cell, folder, words))


def evaluate(
    cell: StudyCell, folder: Path, words: list[str], seconds: float | None
) -> tuple[Figures | None, str | None]:
    """Evaluate, or read the figures; return the figures, or the last line of the error."""
    command = [sys.executable, "-m", "moe_dist", "eval", f"--ranks={cell.ranks}", *command_words(cell, folder, words)]
    return subruns.run_once(result_file(cell, folder, words), command, seconds)
