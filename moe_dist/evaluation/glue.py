"""GLUE: each task is fine-tuned from the same trained weights, once per seed, and scored by its metrics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from moe_dist.config import RunConfig
from moe_dist.errors import ConfigError, TrainingError
from moe_dist.evaluation.fine_tune import FineTuning, fine_tune, predict
from moe_dist.evaluation.glue_data import GlueData, has_task, load_task
from moe_dist.evaluation.glue_metrics import score
from moe_dist.evaluation.glue_tasks import TASKS, GlueTask
from moe_dist.evaluation.sentence_model import Encoded, SentenceModel, encode
from moe_dist.evaluation.tables import with_spread
from moe_dist.evaluation.trained_model import EvaluatedModel, is_quantized

Figures = dict[str, Any]


@dataclass(frozen=True)
class GlueSpec:
    """Options of GLUE.

    Attributes:
        tasks: names; None: all that the folder holds.
        folder: local data; None: the hub.
        seeds: one fine-tuning per seed and task.
        max_train: limit of training rows.
        max_eval: limit of validation rows.
    """

    tasks: tuple[str, ...] | None = None
    folder: Path | None = None
    seeds: int = 3
    max_train: int | None = None
    max_eval: int | None = None
    tuning: FineTuning = field(default_factory=FineTuning)


def evaluate_glue(subject: EvaluatedModel, spec: GlueSpec, dtype: str, say: Callable[[str], None]) -> Figures:
    """Evaluate all tasks and return their figures and averages; collective. All data are read before any training.

    Raises:
        DataError: a task's data are missing or invalid.
        ConfigError: the batch does not divide over the ranks, or the weights are quantized.
        TrainingError: a fine-tuning diverges.
    """
    ranks = subject.process.ranks
    if spec.tuning.batch % ranks:
        raise ConfigError(f"--glue-batch {spec.tuning.batch} is not divisible by the {ranks} ranks")
    wanted = [TASKS[name] for name in spec.tasks or TASKS]
    there = [task for task in wanted if spec.tasks is not None or has_task(task, spec.folder)]
    if not there:
        raise ConfigError(f"--glue {spec.folder}: holds no task's folder: {', '.join(TASKS)}")
    data = {task.name: load_task(task, spec.folder, spec.max_train, spec.max_eval) for task in there}
    tasks = {}
    for task in there:
        tasks[task.name] = _learn(subject, task, data[task.name], spec, dtype)
        say(f"{task.name}: {with_spread(tasks[task.name]['score'])}")
    return {**summary(tasks), "missing": [task.name for task in wanted if task not in there], "tasks": tasks}


def summary(tasks: Mapping[str, Figures]) -> Figures:
    """Average over tasks, seed by seed, with and without WNLI, which the literature often leaves out."""
    found: Figures = {"average": spread(_over_tasks(tasks))}
    others = {name: task for name, task in tasks.items() if name != "wnli"}
    found["average_without_wnli"] = spread(_over_tasks(others)) if others else None
    return found


def _over_tasks(tasks: Mapping[str, Figures]) -> list[float]:
    return [mean(values) for values in zip(*(task["score"]["values"] for task in tasks.values()), strict=True)]


def spread(values: Sequence[float]) -> Figures:
    """Return mean, sample standard deviation (None for one value), and the values by seed."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": list(values)}


def _learn(subject: EvaluatedModel, task: GlueTask, data: GlueData, spec: GlueSpec, dtype: str) -> Figures:
    longest = subject.config.model.sequence_length
    train, *held = (
        [encode(example, subject.tokenizer, longest) for example in rows]
        for rows in (data.train, *data.validation.values())
    )
    validation = dict(zip(data.validation, held, strict=True))
    by_seed = [_one(subject, task, train, validation, spec, seed, dtype) for seed in range(spec.seeds)]
    return {
        "score": spread([mean(scores.values()) for scores in by_seed]),
        "metrics": {name: spread([scores[name] for scores in by_seed]) for name in by_seed[0]},
        "train_rows": len(train),
        "validation_rows": {f"validation{suffix}": len(rows) for suffix, rows in validation.items()},
        "steps": spec.tuning.steps(len(train)),
    }


def _one(
    subject: EvaluatedModel,
    task: GlueTask,
    train: Sequence[Encoded],
    validation: Mapping[str, Sequence[Encoded]],
    spec: GlueSpec,
    seed: int,
    dtype: str,
) -> dict[str, float]:
    """Return the metrics of one fine-tuning, in percent."""
    config, process = _tuning_config(subject.config, spec, dtype), subject.process
    language = subject.model(torch.float32)
    if is_quantized(language):
        raise ConfigError(f"{subject.run}: quantized experts cannot be fine-tuned: give the run that was exported")
    model = SentenceModel(language, task.labels, seed)
    try:
        engine = fine_tune(model, train, spec.tuning, config, seed, process)
    except TrainingError as error:
        raise TrainingError(f"glue:{task.name}, seed {seed}: {error}") from error
    found = {}
    for suffix, rows in validation.items():
        predicted = predict(model, rows, max(1, spec.tuning.batch // process.ranks), process)
        label = np.array([row.label for row in rows])
        found.update({f"{name}{suffix}": 100 * score(name, predicted, label) for name in task.metrics})
    engine.close()
    return found


def _tuning_config(config: RunConfig, spec: GlueSpec, dtype: str) -> RunConfig:
    train = config.train.model_copy(
        update={"precision": dtype, "global_batch_size": spec.tuning.batch, "micro_batch_size": None}
    )
    return config.model_copy(update={"train": train})
