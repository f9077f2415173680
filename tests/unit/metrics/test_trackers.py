"""Weights & Biases and MLflow beside TensorBoard, with stand-ins for both packages."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.launch import preflight
from moe_dist.metrics.recorder import RunRecorder
from tests.unit.metrics.example import summary

STEP = {"train": {"loss": 2.5}, "tokens_per_second": 10.0}


class FakeWandb:
    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.summary: dict[str, float] = {}

    def init(self, **given: Any) -> "FakeWandb":
        self.calls.append((given["project"], given["name"], given["config"]["seed"], given["resume"]))
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.calls.append((step, figures))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


def recorder(folder: Path, *words: str) -> RunRecorder:
    return RunRecorder(load_config(None, [f"runs_dir={folder}", "name=a", "tensorboard=false", *words]))


def test_wandb_receives_steps_evaluations_and_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with recorder(tmp_path, "wandb=moe") as made:
        made.step(1, STEP)
        made.evaluation(1, 8, 2.0)
        made.finish(summary())
    assert fake.calls[:2] == [("moe", "a", 0, "allow"), (1, {"train.loss": 2.5, "tokens_per_second": 10.0})]
    assert fake.calls[2][1].keys() == {"tokens", "validation.loss", "validation.perplexity"}
    assert fake.calls[3:] == [("finish", 0)]
    assert fake.summary["summary.validation.loss"] == 3.4012


def test_mlflow_receives_them_and_a_failure_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def log_metrics(figures: dict[str, float], step: int | None = None) -> None:
        calls.append((step, figures))
        if step == 2:
            raise OSError("no server")

    names = ("set_tracking_uri", "set_experiment", "log_params", "end_run")
    fake = SimpleNamespace(log_metrics=log_metrics, **dict.fromkeys(names, calls.append))
    fake.start_run = lambda run_name: calls.append(run_name)
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with recorder(tmp_path, "mlflow=moe") as made:
        made.step(1, STEP)
        made.step(2, STEP)
        made.step(3, STEP)
        made.finish(summary())
    assert calls[:3] == [f"sqlite:///{tmp_path}/a/mlflow.db", "moe", "a"]
    assert [call[0] for call in calls if isinstance(call, tuple)] == [1, 2]
    said = " ".join(capsys.readouterr().out.split())
    assert "warning: mlflow receives no more figures: no server; training continues" in said


def test_a_missing_package_is_refused_before_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda _: None)
    assert preflight.problems(load_config(None, ["wandb=moe"]), 1) == [
        "wandb=moe needs the package wandb: pip install 'moe-dist[wandb]'"
    ]
