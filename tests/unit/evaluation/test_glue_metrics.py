"""GLUE's metrics against small cases worked out by hand."""

from math import sqrt

import numpy as np
import pytest

from moe_dist.evaluation.glue import spread, summary
from moe_dist.evaluation.glue_metrics import METRICS, score
from moe_dist.evaluation.glue_tasks import TASKS

LABEL = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
PREDICTED = np.array([1.0, 1.0, 0.0, 0.0, 0.0, 1.0])  # two right and one wrong of each class


@pytest.mark.parametrize(
    ("name", "expected"),
    [("accuracy", 4 / 6), ("f1", 2 / 3), ("matthews", (2 * 2 - 1 * 1) / sqrt(3 * 3 * 3 * 3))],
)
def test_classes(name: str, expected: float) -> None:
    assert score(name, PREDICTED, LABEL) == pytest.approx(expected)


def test_f1_is_of_class_1_and_accuracy_of_all() -> None:
    predicted = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert score("f1", predicted, LABEL) == pytest.approx(2 * 3 / (2 * 3 + 2 + 0))
    assert score("accuracy", predicted, LABEL) == pytest.approx(4 / 6)


def test_correlations() -> None:
    label, predicted = np.array([0.0, 1.0, 2.0, 5.0]), np.array([0.1, 0.2, 0.9, 0.5])
    left, right = label - label.mean(), predicted - predicted.mean()
    pearson = (left @ right) / sqrt((left @ left) * (right @ right))
    assert score("pearson", predicted, label) == pytest.approx(pearson)
    assert score("spearman", predicted, label) == pytest.approx(1 - 6 * (1 + 1) / (4 * 15))  # ranks 1 2 4 3
    assert score("spearman", label**3, label) == pytest.approx(1)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman", "f1"])
def test_constant_predictions_are_worth_nothing(name: str) -> None:
    assert score(name, np.zeros(6), LABEL) == 0.0


def test_every_task_has_known_metrics_and_the_paper_s_ones() -> None:
    assert {name for task in TASKS.values() for name in task.metrics} == set(METRICS)
    assert TASKS["cola"].metrics == ("matthews",)
    assert TASKS["stsb"].metrics == ("pearson", "spearman")
    assert TASKS["mrpc"].metrics == TASKS["qqp"].metrics == ("f1", "accuracy")


def test_averages_are_over_tasks_seed_by_seed() -> None:
    tasks = {name: {"score": spread(values)} for name, values in (("cola", [10.0, 30.0]), ("wnli", [50.0, 60.0]))}
    found = summary(tasks)
    assert found["average"] == {"mean": 37.5, "std": pytest.approx(sqrt(2) * 7.5), "values": [30.0, 45.0]}
    assert found["average_without_wnli"]["values"] == [10.0, 30.0]
    assert spread([4.0]) == {"mean": 4.0, "std": None, "values": [4.0]}
