"""The entry script, alone and as DeepSpeed starts it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_dist.config import RunConfig
from moe_dist.errors import LaunchError
from moe_dist.evaluation.spec import EvalSpec
from moe_dist.launch import environment, faults, files, rank
from moe_dist.launch.options import to_json

SCRIPT = Path(rank.__file__)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Take back what the entry script changes: the environment, and the signal that it blocks."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR", "MOE_DIST_JOB_FOLDER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


@pytest.mark.parametrize("file", ["/nowhere/at/all.json", "/"])
def test_a_json_file_that_cannot_be_written_is_one_line(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    assert rank.main([str(tmp_path / "run.yaml"), "--json", file]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"moe-dist: error: --json {file}: cannot be written")
    assert err.count("\n") == 1


@pytest.mark.parametrize("what", ["a folder", "a pipe", "below a file", "nowhere/file"])
def test_what_cannot_be_replaced_by_a_file_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "a folder").mkdir()
    os.mkfifo(tmp_path / "a pipe")
    (tmp_path / "file").write_text("kept")
    target = tmp_path / ("file/out" if what == "below a file" else what)
    with pytest.raises(LaunchError, match=r"^--output .*: cannot be written: give a file in a folder that exists$"):
        files.writable(target, "--output")
    assert files.writable(tmp_path / "file") == str(tmp_path / "file")
    assert files.writable(tmp_path / "new") == str(tmp_path / "new")


def test_settings_may_follow_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    given: list[RunConfig] = []
    monkeypatch.setattr(rank, "_perform", lambda config, *_: given.append(config))
    out = str(tmp_path / "out.json")
    assert rank.main([str(tmp_path / "run.yaml"), "seed=1", "--json", out, "train.steps=30"]) == 0
    assert (given[0].seed, given[0].train.steps, given[0].summary_copy) == (1, 30, out)


@pytest.mark.parametrize("words", [[], ["seed=1"], ["CONFIG"], ["CONFIG", "seed=1"]], ids=str)
def test_a_task_may_do_without_a_configuration(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("name: given\n")
    given: list[tuple[RunConfig, str, object]] = []
    monkeypatch.setattr(rank, "_perform", lambda *arguments: given.append(arguments))
    found = [str(tmp_path / "run.yaml") if word == "CONFIG" else word for word in words]
    assert rank.main(["--task", "doctor", *found]) == 0
    ((config, task, options),) = given
    assert (config.name == "given", config.seed, task, options) == (
        "CONFIG" in words,
        int("seed=1" in words),
        "doctor",
        None,
    )


def test_a_task_gets_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given: list[object] = []
    monkeypatch.setattr(rank, "_perform", lambda config, task, options: given.append(options))
    spec = EvalSpec(Path("runs/a"), stride=3)
    assert rank.main(["--task=evaluate", "--options", to_json(spec), "world.threads=1", "--local_rank=0"]) == 0
    assert given == [spec]
    assert rank.main(["--task=evaluate", "--options", "{}"]) == 2
    assert "--options '{}': 1 validation error" in capsys.readouterr().err


def test_gloo_keeps_deepspeed_off_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    monkeypatch.setattr(rank, "_perform", lambda *_: False)
    monkeypatch.setattr(environment, "has_gpu", lambda: True)
    assert rank.main([str(tmp_path / "run.yaml")]) == 0
    assert "DS_ACCELERATOR" not in os.environ
    assert rank.main([str(tmp_path / "run.yaml"), "world.backend=gloo"]) == 0
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_deepspeeds_words_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("seed: 1\n")
    given: list[RunConfig] = []
    monkeypatch.setattr(rank, "_perform", lambda config, *_: given.append(config))
    assert rank.main(["--local_rank=3", str(config), "seed=5", "train.steps=30", "--json", "out.json"]) == 0
    assert (given[0].seed, given[0].train.steps) == (5, 30)
    assert given[0].summary_copy == str(Path.cwd() / "out.json")
    assert os.environ["WORLD_SIZE"] == "1"


def test_an_interrupted_run_returns_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    (tmp_path / "run.yaml").write_text("{}")
    monkeypatch.setattr(rank, "_perform", interrupted)
    assert rank.main([str(tmp_path / "run.yaml")]) == 130
    assert capsys.readouterr().err == "moe-dist: interrupted\n"


SRUN = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NUM_TASKS": "2"}
RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "code"),
    [({}, 75), ({**SRUN, **RENDEZVOUS}, 0), ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **RENDEZVOUS}, 75)],
    ids=["alone", "srun, which would kill the others", "by hand"],
)
def test_a_run_that_stopped_as_asked_says_so(
    variables: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    os.environ.update(variables)
    monkeypatch.setattr(rank, "_perform", lambda *_: True)
    monkeypatch.setattr(faults, "register", lambda rank, end_with_parent: None)
    assert rank.main([str(tmp_path / "run.yaml")]) == code


@pytest.mark.parametrize(
    ("place", "word", "line"),
    [
        ({}, "moe.top_k=9", "moe-dist: error: moe.top_k=9 is larger than a cluster"),
        ({"RANK": "0"}, "seed=1", "moe-dist: error: WORLD_SIZE is not set"),
        (
            {"WORLD_SIZE": "3"},
            "seed=1",
            "moe-dist: rank 0 failed: train.global_batch_size=32 is not divisible by 3 ranks",
        ),
        (
            {"WORLD_SIZE": "6"},
            "world.data=4",
            "moe-dist: rank 0 failed: world.data=4 x world.cluster=1 x world.shard=1",
        ),
    ],
)
def test_refusals_come_before_torch(tmp_path: Path, place: dict[str, str], word: str, line: str) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    if "WORLD_SIZE" in place:
        place = {**place, "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    variables = {**os.environ, **place, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), str(tmp_path / "run.yaml"), word]
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
