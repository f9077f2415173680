"""Trackers beside TensorBoard: Weights & Biases and MLflow, each by one key (`wandb`, `mlflow`)."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from moe_dist.config import RunConfig
from moe_dist.metrics.summary import flatten

PARAMETERS_AT_ONCE = 100  # MLflow's limit


class Tracker(Protocol):
    """Service that receives a run's figures."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of a step by dotted key."""

    def finish(self, figures: Mapping[str, float] | None) -> None:
        """Record the figures of the whole run, if it is complete, and close."""


class WandbTracker:
    """Run of Weights & Biases; `WANDB_MODE=offline` keeps it below the run's folder, for `wandb sync`."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=config.wandb, name=folder.name, dir=str(folder), config=config.model_dump(mode="json"),
            id=hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16], resume="allow",
        )  # fmt: skip

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of a step."""
        self._run.log(dict(figures), step=step)

    def finish(self, figures: Mapping[str, float] | None) -> None:
        """Record the run's summary and close."""
        self._run.summary.update({f"summary.{name}": value for name, value in (figures or {}).items()})
        self._run.finish(exit_code=int(figures is None))


class MlflowTracker:
    """Run of MLflow, in `mlflow.db` of the run's folder unless `MLFLOW_TRACKING_URI` names a server or folder."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self._mlflow = mlflow = import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        mlflow.set_experiment(config.mlflow)
        mlflow.start_run(run_name=folder.name)
        parameters = flatten(config.model_dump(mode="json"))
        while part := dict(islice(parameters, PARAMETERS_AT_ONCE)):
            mlflow.log_params(part)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Record the figures of a step."""
        self._mlflow.log_metrics(dict(figures), step=step)

    def finish(self, figures: Mapping[str, float] | None) -> None:
        """Record the run's summary and close."""
        if figures is not None:
            self._mlflow.log_metrics({f"summary.{name}": value for name, value in figures.items()})
        self._mlflow.end_run("FINISHED" if figures is not None else "FAILED")


class Trackers:
    """Configured trackers of a run; one that fails is left out from then on, and training continues.

    Args:
        warn: called with a line about a tracker that fails.
    """

    def __init__(self, config: RunConfig, folder: Path, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._open: dict[str, Tracker] = {}
        kinds: dict[str, Callable[[RunConfig, Path], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}
        for name, kind in kinds.items():
            if getattr(config, name) is not None:
                self._try(name, partial(self._start, name, kind, config, folder))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Record the numbers of a step."""
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.log, step, dict(numbers(values))))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """Record the summary, None for a run that is not complete, and close; may be called twice."""
        for name, tracker in list(self._open.items()):
            figures = None if summary is None else dict(numbers(summary))
            self._try(name, partial(tracker.finish, figures))
            self._open.pop(name, None)

    def _start(self, name: str, kind: Callable[[RunConfig, Path], Tracker], config: RunConfig, folder: Path) -> None:
        self._open[name] = kind(config, folder)

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._warn(f"warning: {name} receives no more figures: {reason}; training continues")


def numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield every finite number of a tree by its dotted key; lists and words are left out."""
    for name, value in flatten(values):
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield name, value
