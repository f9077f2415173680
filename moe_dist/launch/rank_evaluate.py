"""The entry script of every rank of `moe-dist eval`: `launcher/evaluate.py RUN [SECTION.KEY=value ...] [options]`.

Sections are `world` and `memory`: how this job's ranks work.
"""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # started by path: import from the repository, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from moe_dist.config import RunConfig, load_config
from moe_dist.errors import LaunchError
from moe_dist.launch.rank import fitting_any_ranks, run_rank

MEMORY = "memory."
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "wnli", "qnli", "qqp", "mnli")


@dataclass(frozen=True)
class EvalOptions:
    """What `moe-dist eval` was asked for; None: a default that depends on the run.

    Attributes:
        tasks: `wikitext`, `glue` (all that there are) or `glue:<task>`.
        text: file or folder of the text; None: the hub.
        subset: of WikiText on the hub.
        window: tokens that a window predicts.
        stride: between windows.
        batch: windows, or sentences, that a rank holds at once.
        dtype: of weights and computation.
        json_file: also write the figures here.
        glue: folder of GLUE's data; None: the hub.
        seeds, epochs, glue_batch, learning_rate, max_train, max_eval, max_steps: of fine-tuning on each task.
    """

    tasks: tuple[str, ...] = ("wikitext",)
    text: str | None = None
    split: str = "validation"
    subset: str = "wikitext-103-raw-v1"
    window: int | None = None
    stride: int | None = None
    batch: int = 8
    dtype: str = "float32"
    json_file: str | None = None
    glue: str | None = None
    seeds: int = 3
    epochs: float = 3.0
    glue_batch: int = 32
    learning_rate: float | None = None
    max_train: int | None = None
    max_eval: int | None = None
    max_steps: int | None = None

    def words(self) -> list[str]:
        """The options for this script; `parse` reads them back."""
        return [f"--options={json.dumps(asdict(self))}"]


def parse_tasks(words: Sequence[str]) -> tuple[str, ...]:
    """`wikitext`, `glue` or `glue:cola,sst2` as single tasks, each once.

    Raises:
        LaunchError: a task that there is not.
    """
    found: list[str] = []
    for word in words:
        group, colon, names = word.partition(":")
        tasks = [f"{group}:{name}" for name in names.split(",")] if colon else [group]
        if not {*tasks} <= {"wikitext", "glue", *(f"glue:{name}" for name in GLUE_TASKS)}:
            raise LaunchError(f"--task {word}: give wikitext, glue or glue:TASK,TASK of {', '.join(GLUE_TASKS)}")
        found += tasks
    return tuple(dict.fromkeys(found))


def evaluate_rank(run: str, overrides: Sequence[str], options: EvalOptions) -> int:
    """Does one rank's part of an evaluation and returns its exit code."""

    memory = [word for word in overrides if word.startswith(MEMORY)]
    world = [word for word in overrides if word not in memory]

    def evaluate(config: RunConfig) -> bool:
        from moe_dist.evaluation.evaluate import EvalSpec  # here, since it loads torch
        from moe_dist.evaluation.evaluate import evaluate as really

        really(config.world, EvalSpec(run=Path(run), **asdict(options)), load_config(None, memory).memory)
        return False

    return run_rank(None, fitting_any_ranks(world), evaluate)


def only_of_the_job(overrides: Sequence[str]) -> list[str]:
    """The words, none of which may set what the run itself has settled.

    Raises:
        LaunchError: a key of another section.
    """
    for word in overrides:
        if not word.startswith(("world.", MEMORY)):
            raise LaunchError(
                f"{word!r}: an evaluation takes the model as it was trained: only world.KEY=value and "
                "memory.KEY=value can be set"
            )
    return list(overrides)


def parse(arguments: Sequence[str] | None = None) -> tuple[str, list[str], EvalOptions]:
    """Run, overrides and options from the words after the script's name."""
    parser = ArgumentParser(prog="launcher/evaluate.py", description="One rank of an evaluation.")
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*", metavar="SECTION.KEY=value")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    words = parser.parse_intermixed_args(arguments)
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in words.options.items()
    }
    return words.run, words.overrides, EvalOptions(**given)


def main() -> int:
    """Read the words after the script's name and do one rank's work."""
    return evaluate_rank(*parse())


if __name__ == "__main__":
    sys.exit(main())
