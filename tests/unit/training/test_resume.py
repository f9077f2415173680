"""Which run and checkpoint `checkpoint.resume` means, without any rank: the words, paths and requeued jobs."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from moe_dist.checkpoint.find import ValidCheckpoint
from moe_dist.checkpoint.manifest import read_manifest
from moe_dist.checkpoint.store import step_folder
from moe_dist.config import load_config
from moe_dist.errors import CheckpointError, ConfigError
from moe_dist.metrics import run_lock
from moe_dist.metrics.run_lock import RunLock
from moe_dist.training import resume
from moe_dist.training.finished_run import show_if_finished
from moe_dist.training.run_history import RunHistory
from tests.unit.checkpoint.samples import saved
from tests.unit.metrics.example import summary


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*resume.RESTART_COUNTS, "SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def folder(runs: Path, name: str, job: str | None = None, of: str = "a", steps: tuple[int, ...] = (1,)) -> Path:
    """A run with checkpoints of those steps, empty ones: their files are not read."""
    run = runs / name
    run.mkdir()
    for step in steps:
        step_folder(run, step).mkdir(parents=True)
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


def test_auto_passes_over_runs_without_a_checkpoint(tmp_path: Path) -> None:
    for name, steps in (("a", (1,)), ("a-2", (1, 2)), ("a-3", ()), ("a-4", ())):
        folder(tmp_path, name, steps=steps)
    choice = resume._choose_run(load_config(None, [f"runs_dir={tmp_path}", "name=a", "checkpoint.resume=auto"]))
    assert choice.run == tmp_path / "a-2"
    assert [path.name for path in choice.skipped] == ["a-4", "a-3"]
    assert choice.behind == ((tmp_path / "a", 1),)


def test_auto_takes_the_run_that_got_furthest(tmp_path: Path) -> None:
    for name, steps in (("a", (1, 7)), ("a-2", (1, 3)), ("a-3", ())):
        folder(tmp_path, name, steps=steps)
    assert chosen(tmp_path, "auto") == "a"
    (tmp_path / "a-3" / "summary.json").write_text('{"steps": 7}')  # as far as the first, and newer
    assert chosen(tmp_path, "auto") == "a-3"
    (tmp_path / "a-3" / "summary.json").write_text("{}")
    assert chosen(tmp_path, "auto") == "a"
    (tmp_path / "a-3" / "summary.json").write_text('{"steps": 400}')  # all of the default's steps
    assert chosen(tmp_path, "auto") == "a", "nothing is left to do in a complete run"


def test_auto_without_any_checkpoint_starts_anew(tmp_path: Path) -> None:
    for name in ("a", "a-2"):
        folder(tmp_path, name, steps=())
    choice = resume._choose_run(load_config(None, [f"runs_dir={tmp_path}", "name=a", "checkpoint.resume=auto"]))
    assert choice.run is None
    assert [path.name for path in choice.skipped] == ["a-2", "a"]


def test_what_was_passed_over_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"runs_dir={tmp_path}", "name=a", "checkpoint.resume=auto", "tensorboard=false"]
    first, second, third = folder(tmp_path, "a"), folder(tmp_path, "a-2", steps=()), tmp_path / "a-1"
    manifest = read_manifest(saved(tmp_path / "other", 3)[0])
    found = ValidCheckpoint(step_folder(first, 3), manifest)
    with resume.open_recorder(
        load_config(None, words), 0, resume.Resumption(found, first, [], (second,), ((third, 2),))
    ):
        pass
    said = " ".join(capsys.readouterr().out.split())
    assert f"no checkpoint in {second}: resumes the run before, {first}" in said
    assert f"resumes {first}, of this name the furthest with steps left; others: {third} (step 2)" in said
    event = json.loads((first / "events.jsonl").read_text().splitlines()[-1])
    assert (event["event"], event["step"], event["skipped"]) == ("resumed", 3, [str(second)])
    with resume.open_recorder(load_config(None, words), 0, None) as recorder:
        assert recorder.folder == tmp_path / "a-3"
    said = " ".join(capsys.readouterr().out.split())
    assert f"no checkpoint to resume from in {second}, {first}: starts anew at step 0" in said


@pytest.mark.parametrize("word", ["auto", "PATH"])
def test_a_run_that_another_job_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)
    run = folder(tmp_path, "a")
    config = load_config(
        None, [f"runs_dir={tmp_path}", "name=a", f"checkpoint.resume={run if word == 'PATH' else word}"]
    )
    other = RunLock(run)
    with pytest.raises(ConfigError, match=rf"{run} is in use by another job \(process {os.getpid()} on .*\)"):
        resume._lock(resume._choose_run(config))
    other.release()
    lock = resume._lock(resume._choose_run(config))
    assert lock is not None
    lock.release()


def test_a_new_run_of_the_name_that_is_being_written_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no checkpoint yet; the one before it would go on beside it."""
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0.2)
    folder(tmp_path, "a")
    other = RunLock(folder(tmp_path, "a-2", steps=()))
    choice = resume._choose_run(load_config(None, [f"runs_dir={tmp_path}", "name=a", "checkpoint.resume=auto"]))
    with pytest.raises(ConfigError, match=r"a-2 is in use by another job"):
        resume._lock(choice)
    other.release()


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
    config = load_config(None, [f"checkpoint.resume={word}"])
    run = resume.run_to_go_on(config)
    return run, resume._checkpoint_of(config, run)


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
