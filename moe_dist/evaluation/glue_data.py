"""Rows of a GLUE task from a local folder of JSON lines or from the hub, validated before any training."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.data.hub import HubSource
from moe_dist.data.table_files import json_objects
from moe_dist.errors import DataError
from moe_dist.evaluation.glue_tasks import STS_B_HIGHEST, GlueTask

HUB_NAME, TRAIN, VALIDATION = "nyu-mll/glue", "train", "validation"


@dataclass(frozen=True)
class Example:
    """One row: one or two sentences, and a class or (STS-B) a similarity."""

    sentences: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class GlueData:
    """Rows of a task; `validation` is keyed by the suffix of its metrics' names."""

    train: list[Example]
    validation: dict[str, list[Example]]


def load_task(
    task: GlueTask, folder: Path | None, max_train: int | None = None, max_eval: int | None = None
) -> GlueData:
    """Read and validate all splits of a task.

    Args:
        folder: local data, `<task>/train.jsonl` and `<task>/validation.jsonl` (MNLI: also `validation_matched.jsonl`
            and `validation_mismatched.jsonl`), with the columns of the hub's data set; None: the hub.
        max_train, max_eval: limits of rows; the same random sample each time.

    Raises:
        DataError: a split is missing or empty, lacks a column, or has invalid labels.
    """
    train = _checked(task, *_open(task, TRAIN, folder))
    found = {}
    for split, suffix in _validation_splits(task, folder):
        found[suffix] = _limited(_checked(task, *_open(task, split, folder)), max_eval)
    return GlueData(_limited(train, max_train), found)


def has_task(task: GlueTask, folder: Path | None) -> bool:
    """Return True if a local folder holds the task; the hub holds all."""
    return folder is None or (folder / task.name).is_dir()


def _validation_splits(task: GlueTask, folder: Path | None) -> tuple[tuple[str, str], ...]:
    """Return the validation splits; a local `validation.jsonl` of MNLI is the matched one."""
    if folder is None or len(task.validation) == 1:
        return task.validation
    named = tuple((split, suffix) for split, suffix in task.validation if _file(task, split, folder).is_file())
    return named or ((VALIDATION, task.validation[0][1]),)


def _file(task: GlueTask, split: str, folder: Path) -> Path:
    return folder / task.name / f"{split}.jsonl"


def _open(task: GlueTask, split: str, folder: Path | None) -> tuple[str, Iterable[Mapping[str, Any]]]:
    """Return the name of the source of a split, and its rows."""
    if folder is None:
        source = HubSource(HUB_NAME, task.name, split, "label", "split", "", "--glue with a local folder")
        return f"{HUB_NAME} {task.name}/{split}", source.table
    file = _file(task, split, folder)
    if not file.is_file():
        raise DataError(f"{file}: no such file: --glue takes a folder with {task.name}/{split}.jsonl")
    return str(file), (row for _, row in json_objects(file))


def _checked(task: GlueTask, origin: str, rows: Iterable[Mapping[str, Any]]) -> list[Example]:
    examples = [_example(task, f"{origin}: row {number}", row) for number, row in enumerate(rows, 1)]
    if not examples:
        raise DataError(f"{origin}: the split is empty")
    return examples


def _example(task: GlueTask, where: str, row: Mapping[str, Any]) -> Example:
    for column in (*task.columns, "label"):
        if column not in row:
            raise DataError(f"{where} has no column {column!r}; it has: {', '.join(row) or 'none'}")
    for column in task.columns:
        if not isinstance(row[column], str):
            raise DataError(f"{where}: {column} is {row[column]!r}, not text")
    return Example(tuple(row[column] for column in task.columns), _label(task, where, row["label"]))


def _label(task: GlueTask, where: str, label: Any) -> float:
    known = isinstance(label, (int, float)) and not isinstance(label, bool)
    if task.labels is None:
        if not known or not 0 <= label <= STS_B_HIGHEST:  # false for NaN too
            raise DataError(f"{where}: label={label!r}, expected a number from 0 to 5 ({task.name})")
    elif not known or label not in range(task.labels):
        hint = " (those of test splits are not public)" if label == -1 else ""
        names = ", ".join(map(str, range(task.labels)))
        raise DataError(f"{where}: label={label!r}, expected {names} ({task.name}){hint}")
    return float(label)


def _limited(examples: list[Example], most: int | None) -> list[Example]:
    if most is None or len(examples) <= most:
        return examples
    chosen = np.random.RandomState(0).permutation(len(examples))[:most]
    return [examples[index] for index in sorted(chosen)]
