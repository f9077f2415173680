"""Ranks of one unsupervised launcher find out which of them is gone."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moe_dist.launch import faults, sibling_ranks

ENDED = "import os; os._exit(0)"


def _leave_pid(folder: Path, rank: int, pid: int) -> None:
    (folder / f"rank-{rank}.pid").write_text(json.dumps({"pid": pid, "group": pid}))


def _pid_of_an_ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ENDED])
    process.wait()
    return process.pid


def test_a_rank_that_is_gone_without_a_word_is_named(tmp_path: Path) -> None:
    _leave_pid(tmp_path, 0, os.getpid())
    assert sibling_ranks.killed_rank(tmp_path) is None
    gone = _pid_of_an_ended_process()
    _leave_pid(tmp_path, 3, gone)
    assert sibling_ranks.killed_rank(tmp_path) == (3, gone)
    (tmp_path / "rank-3.done").touch()
    assert sibling_ranks.killed_rank(tmp_path) is None


def test_a_zombie_is_gone(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENDED])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not reaped
    _leave_pid(tmp_path, 1, process.pid)
    assert sibling_ranks.killed_rank(tmp_path) == (1, process.pid)
    process.wait()


@pytest.fixture
def unsupervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(faults.JOB_FOLDER, raising=False)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = sibling_ranks.shared_folder()
    assert folder is not None
    return folder


def test_the_folder_is_the_launchers_own_and_private(unsupervised: Path) -> None:
    assert sibling_ranks.shared_folder() == unsupervised
    assert unsupervised.stat().st_mode & 0o777 == 0o700


def test_what_ended_launchers_left_is_removed(unsupervised: Path) -> None:
    start, _, _ = unsupervised.name.rpartition(f"-{os.getppid()}-")
    left = unsupervised.with_name(f"{start}-{_pid_of_an_ended_process()}-123")
    left.mkdir()
    sibling_ranks.remove_abandoned()
    assert not left.exists()
    assert unsupervised.exists()


def test_what_is_of_other_process_numbers_stays(unsupervised: Path) -> None:
    """A launcher in another container, which shares the folder for temporary files, may live though we see none."""
    space = os.stat("/proc/self/ns/pid").st_ino
    assert f"-{space}-" in unsupervised.name
    theirs = unsupervised.with_name(unsupervised.name.replace(f"-{space}-", f"-{space + 1}-"))
    theirs.mkdir()
    sibling_ranks.remove_abandoned()
    assert theirs.exists()


def test_who_lost_a_peer_names_the_killed_one(unsupervised: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _leave_pid(unsupervised, 0, os.getpid())
    gone = _pid_of_an_ended_process()
    _leave_pid(unsupervised, 1, gone)
    faults.report(0, 2, RuntimeError("Connection closed by peer [127.0.0.1]:3"))
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"moe-dist: rank 1 failed: its process (pid {gone})")


def test_who_lost_a_peer_repeats_the_first_fault(unsupervised: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        _leave_pid(unsupervised, rank, os.getpid())
    faults.report(1, 2, ValueError("boom"))
    faults.report(0, 2, RuntimeError("Connection closed by peer [127.0.0.1]:3"))
    assert capsys.readouterr().err.splitlines()[-1] == "moe-dist: rank 1 failed: ValueError: boom"


def test_a_rank_that_is_started_again_has_no_fault_yet(unsupervised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_end_with", lambda watched: None)
    _leave_pid(unsupervised, 1, _pid_of_an_ended_process())
    faults.report(1, 2, ValueError("the last time"))
    assert faults.read_fault(unsupervised, 1) is not None
    faults.register(1, end_with_parent=False)
    assert faults.read_fault(unsupervised, 1) is None
    assert json.loads((unsupervised / "rank-1.pid").read_text())["pid"] == os.getpid()
