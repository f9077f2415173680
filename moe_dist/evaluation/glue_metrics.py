"""GLUE's official metrics, computed by scikit-learn and scipy."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy.typing as npt
from scipy import stats
from sklearn import metrics

Values = npt.NDArray[Any]
Metric = Callable[[Values, Values], float]


def score(name: str, predicted: Values, label: Values) -> float:
    """Compute a metric of predictions against labels, from -1 or 0 to 1.

    A correlation with constant predictions is undefined; it counts as 0, as Matthews' does.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about undefined correlations
        value = float(METRICS[name](label, predicted))
    return value if math.isfinite(value) else 0.0


METRICS: dict[str, Metric] = {
    "matthews": metrics.matthews_corrcoef,
    "accuracy": metrics.accuracy_score,
    "f1": lambda label, predicted: float(metrics.f1_score(label, predicted, zero_division=0)),
    "pearson": lambda label, predicted: float(stats.pearsonr(label, predicted).statistic),
    "spearman": lambda label, predicted: float(stats.spearmanr(label, predicted).statistic),
}
