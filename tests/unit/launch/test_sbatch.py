"""What slurm/train.sbatch does with signals and exit codes, with stand-ins for SLURM and for Python."""

import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from moe_dist.launch.commands import TRAIN_SBATCH

LIMIT = 60.0  # a guard against hangs
ACCEPTED = "exit 0"
ASKED_WHILE_CHECKING = "touch up; until [ -e go ]; do sleep 0.02; done"
NEVER = "touch started; exit 1"
STOPS = "trap 'exit 0' USR1; touch up; while :; do sleep 0.02; done"
REFUSES = 'echo "no such text" >>"$MOE_DIST_REFUSALS"; exit 143'


@contextmanager
def job(folder: Path, python: str, srun: str, variables: Mapping[str, str]) -> Iterator["subprocess.Popen[str]"]:
    """The template as SLURM would start it; `python` checks the configuration, `srun` is all ranks."""
    programs = folder / "programs"
    programs.mkdir()
    for name, text in {"python": python, "srun": srun, "scontrol": 'echo "$*" >>requeued'}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "VENV": "", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}
    command = ["bash", str(TRAIN_SBATCH), "CONFIG"]
    with subprocess.Popen(
        command, cwd=folder, env={**environment, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize(
    ("python", "srun", "variables", "code", "requeued"),
    [
        (ACCEPTED, "exit 0", {}, 0, False),
        (ACCEPTED, "exit 1", {}, 1, True),
        (ACCEPTED, "exit 143", {"SLURM_RESTART_COUNT": "3"}, 143, True),
        (ACCEPTED, "exit 1", {"SLURM_RESTART_COUNT": "4"}, 1, False),
        (ACCEPTED, "exit 2", {}, 2, False),
        (ACCEPTED, REFUSES, {}, 2, False),
        ("exit 2", NEVER, {}, 2, False),
        ("exit 127", NEVER, {}, 127, False),
    ],
)
def test_what_may_succeed_another_time_is_put_back(
    tmp_path: Path, python: str, srun: str, variables: dict[str, str], code: int, requeued: bool
) -> None:
    with job(tmp_path, python, srun, variables) as child:
        _, err = child.communicate(timeout=LIMIT)
    assert (child.returncode, err) == (code, "")
    assert (tmp_path / "requeued").exists() is requeued
    assert not (tmp_path / "started").exists()
    assert not list(tmp_path.glob(".refused*"))


def ask_to_stop(child: "subprocess.Popen[str]", folder: Path) -> tuple[str, str]:
    """Sends SIGUSR1 once one of the stand-ins is up; what the job then says."""
    deadline = time.monotonic() + LIMIT
    while not (folder / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGUSR1)
    (folder / "go").touch()
    return child.communicate(timeout=LIMIT)


@pytest.mark.parametrize(
    ("python", "srun", "variables"),
    [
        (ACCEPTED, STOPS, {}),
        (ACCEPTED, STOPS, {"SLURM_RESTART_COUNT": "9"}),
        (ASKED_WHILE_CHECKING, NEVER, {}),
    ],
)
def test_a_job_that_is_asked_to_stop_goes_on_later(
    tmp_path: Path, python: str, srun: str, variables: dict[str, str]
) -> None:
    with job(tmp_path, python, srun, variables) as child:
        out, err = ask_to_stop(child, tmp_path)
    assert (child.returncode, err) == (0, "")
    assert "exit code 0, asked to stop" in out
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(
    ("python", "srun"), [(f"{ASKED_WHILE_CHECKING}; exit 2", NEVER), (ACCEPTED, f"{ASKED_WHILE_CHECKING}; {REFUSES}")]
)
def test_what_is_refused_is_not_put_back_though_it_was_asked_to_stop(tmp_path: Path, python: str, srun: str) -> None:
    with job(tmp_path, python, f"trap : USR1; {srun}", {}) as child:
        ask_to_stop(child, tmp_path)
    assert child.returncode == 2
    assert not (tmp_path / "requeued").exists()


def test_the_environment_is_found_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "own" / "bin").mkdir(parents=True)
    (tmp_path / "own" / "bin" / "python").write_text('#!/bin/bash\necho "$0 $*" >>calls\n')
    (tmp_path / "own" / "bin" / "python").chmod(0o755)
    with job(tmp_path, NEVER, '"${@:2}"', {"VENV": "own"}) as child:
        _, err = child.communicate(timeout=LIMIT)
    assert (child.returncode, err) == (0, "")
    python = tmp_path / "own" / "bin" / "python"
    calls = [f"{python} -m moe_dist config CONFIG --ranks 2 --check", f"{python} -u -m moe_dist.launch.rank CONFIG"]
    assert (tmp_path / "calls").read_text().splitlines() == calls
