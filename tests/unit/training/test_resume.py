"""Which run and checkpoint `checkpoint.resume` means, without any rank: the words, paths and requeued jobs."""

import json
from pathlib import Path
from typing import Any

import pytest

from moe_dist.config import load_config
from moe_dist.errors import CheckpointError
from moe_dist.training import resume
from moe_dist.training.finished_run import show_if_finished
from moe_dist.training.run_history import RunHistory
from tests.unit.checkpoint.samples import saved
from tests.unit.metrics.example import summary


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*resume.RESTART_COUNTS, "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def folder(runs: Path, name: str, job: str | None = None, of: str = "a") -> Path:
    run = runs / name
    run.mkdir()
    (run / "events.jsonl").write_text(json.dumps({"event": "started", "step": 0, "run": of, "job": job}) + "\n")
    return run


def chosen(runs: Path, word: str) -> str | None:
    run = resume.run_to_go_on(load_config(None, [f"runs_dir={runs}", "name=a", f"checkpoint.resume={word}"]))
    return None if run is None else run.name


def test_auto_takes_the_newest_run_of_the_name(tmp_path: Path) -> None:
    assert chosen(tmp_path / "none", "auto") is None
    for name in ("a", "a-2", "a-10", "a-b", "b-11", "ab", "a-3x"):
        folder(tmp_path, name)
    folder(tmp_path, "a-11", of="a-11")  # a name that only looks like one of ours
    assert chosen(tmp_path, "auto") == "a-10"
    assert chosen(tmp_path, "none") is None
    assert chosen(tmp_path, "requeued") is None


@pytest.mark.parametrize(
    ("job", "variables"),
    [
        ("slurm-7", {"SLURM_JOB_ID": "7"}),
        ("slurm-5_2", {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}),
    ],
)
def test_a_requeued_job_takes_its_own_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, variables: dict[str, str]
) -> None:
    folder(tmp_path, "a", job)
    folder(tmp_path, "a-2", "slurm-8")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    assert chosen(tmp_path, "requeued") is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert chosen(tmp_path, "requeued") == "a"
    (tmp_path / "a" / "events.jsonl").write_text("not JSON")
    assert chosen(tmp_path, "requeued") is None


def test_torchrun_starting_again_takes_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path, "a")
    folder(tmp_path, "a-2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert chosen(tmp_path, "requeued") == "a-2"


def wanted(word: object) -> Any:
    return resume._wanted(load_config(None, [f"checkpoint.resume={word}"]))


def test_a_run_s_path_goes_on_and_a_checkpoint_s_path_branches_off(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 1, 2)
    run, found = wanted(tmp_path)
    assert (run, found.path) == (tmp_path, second)
    run, found = wanted(first)
    assert (run, found.path) == (None, first)


def test_a_path_with_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint: give auto, none"):
        wanted(tmp_path)


def test_a_finished_run_shows_its_summary_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, copy = folder(tmp_path, "a"), tmp_path / "copy.json"
    words = [f"runs_dir={tmp_path}", "name=a", "checkpoint.resume=auto", f"summary_copy={copy}", "train.warmup_steps=0"]
    steps = summary()["steps"]
    config = load_config(None, [*words, f"train.steps={steps}"])
    assert not show_if_finished(config, rank=0)
    (run / "summary.json").write_text(json.dumps(summary()))
    assert not show_if_finished(load_config(None, [*words, f"train.steps={steps + 1}"]), rank=0)
    assert show_if_finished(config, rank=1)
    assert not copy.exists()
    assert show_if_finished(config, rank=0)
    assert json.loads(copy.read_text()) == summary()
    assert "nothing is left to do" in capsys.readouterr().out


def test_the_account_returns_as_it_was() -> None:
    account = RunHistory(
        [0.5, 0.25], [{"cv2": 0.1, "rank": {"cv2": i}} for i in (0.5, 2.0)], [{"step": 2, "loss": 1.5}]
    )
    for original in (account, RunHistory()):
        again = RunHistory()
        again.load_state_dict(original.state_dict())
        assert again == original
