"""Specification of an evaluation; imports no torch, so that a refusal is immediate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_dist.errors import LaunchError
from moe_dist.launch.options import option

MEMORY = "memory."
HELD_OUT = "held-out"
"""Task of the validation text that the run was trained with."""
HARNESS = "lm-eval:"
"""Prefix of the tasks of lm-evaluation-harness."""
GLUE_TASKS = ("cola", "sst2", "mrpc", "stsb", "rte", "wnli", "qnli", "qqp", "mnli")


@dataclass(frozen=True)
class EvalSpec:
    """Evaluation of one trained model.

    Attributes:
        run: folder of a run, a checkpoint, or a file of weights.
        memory: overrides of the section `memory` for this job.
        json_file: file that also receives the figures.
    """

    run: Path
    tasks: tuple[str, ...] = option(
        ("wikitext",),
        "held-out (the run's own text), wikitext, glue, glue:cola,sst2 or lm-eval:NAME,NAME; may be given again. "
        "Default: held-out, with --text wikitext.",
        flag="--task",
        metavar="TASK",
    )
    text: Path | None = option(None, "File or folder of the text; default: WikiText from the hub.")
    split: Literal["validation", "test"] = option("validation", "Split of WikiText.")
    subset: str = option("wikitext-103-raw-v1", "Subset of WikiText on the hub.")
    window: int | None = option(None, "Tokens that a window predicts; default: the training length.", minimum=1)
    stride: int | None = option(None, "Tokens between the starts of windows; default: half a window.", minimum=1)
    batch: int = option(8, "Windows (GLUE: sentences) that a rank processes at once.", minimum=1)
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Computation; float32 gives the same figure on any number of ranks."
    )
    glue: Path | None = option(None, "Folder with TASK/train.jsonl and TASK/validation.jsonl; default: the hub.")
    seeds: int = option(3, "Fine-tuning runs of each task.", minimum=1)
    epochs: float = option(3.0, "Epochs of fine-tuning on each task.", minimum=0.0)
    glue_batch: int = option(32, "Sentences per step of fine-tuning, over all ranks.", minimum=1)
    learning_rate: float | None = option(
        None, "Learning rate of fine-tuning; default: a quarter of the run's.", minimum=0.0
    )
    max_train: int | None = option(None, "Limit of the training rows of a task.", minimum=1)
    max_eval: int | None = option(None, "Limit of the validation rows of a task.", minimum=1)
    max_steps: int | None = option(None, "Limit of the steps of fine-tuning.", minimum=1)
    include_path: Path | None = option(None, "Folder with further tasks of lm-eval, each a YAML file.")
    num_fewshot: int | None = option(None, "Examples in each prompt of lm-eval; default: the task's.", minimum=0)
    limit: int | None = option(None, "Limit of the documents of each task of lm-eval.", minimum=1)
    memory: tuple[str, ...] = ()
    json_file: str | None = None


def parse_tasks(words: Sequence[str]) -> tuple[str, ...]:
    """Split `held-out`, `wikitext`, `glue`, `glue:cola,sst2` and `lm-eval:piqa,arc_easy` into single tasks, each once.

    Raises:
        LaunchError: a task is unknown.
    """
    found: list[str] = []
    for word in words:
        group, colon, names = word.partition(":")
        tasks = [f"{group}:{name}" for name in names.split(",")] if colon else [group]
        harness = word.startswith(HARNESS) and all(names.split(","))
        if not harness and not {*tasks} <= {HELD_OUT, "wikitext", "glue", *(f"glue:{name}" for name in GLUE_TASKS)}:
            glue = f"glue, glue:TASK,TASK of {', '.join(GLUE_TASKS)}"
            raise LaunchError(f"--task {word}: give {HELD_OUT}, wikitext, {glue}, or lm-eval:NAME,NAME")
        found += tasks
    return tuple(dict.fromkeys(found))


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split overrides into those of the section `world` and those of `memory`.

    Raises:
        LaunchError: an override is of a section that the run's saved configuration fixes.
    """
    for word in overrides:
        if not word.startswith(("world.", MEMORY)):
            raise LaunchError(
                f"{word!r}: an evaluation takes the model as it was trained: only world.KEY=value and "
                "memory.KEY=value can be set"
            )
    memory = tuple(word for word in overrides if word.startswith(MEMORY))
    return [word for word in overrides if word not in memory], memory
