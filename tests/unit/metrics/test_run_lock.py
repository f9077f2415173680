"""The lock of a run's folder: between processes, after a kill, and on file systems without locks."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_dist.errors import ConfigError
from moe_dist.metrics import RunFolder, run_lock
from moe_dist.metrics.run_lock import RunLock

HOLD = "import sys, time; from pathlib import Path; from moe_dist.metrics.run_lock import RunLock\n"
HOLD += "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_lock_holds_between_processes_and_ends_with_its_holder(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=rf"is in use by another job \(process {other.pid} on ") as refused:
            RunLock(tmp_path, patience=0)
        assert refused.value.exit_code == 2
        assert "\n" not in str(refused.value)
        other.send_signal(signal.SIGKILL)
        other.wait()
    RunLock(tmp_path).release()


def test_a_second_writer_of_a_folder_is_refused_until_the_first_has_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "PATIENCE_SECONDS", 0)
    run = RunFolder.create(tmp_path, "demo", "", tensorboard=False)
    run.event("started", 0)
    with pytest.raises(ConfigError, match="in use by another job"):
        RunFolder.reopen(run.path, 0, "", tensorboard=False)
    assert (run.path / "events.jsonl").read_text().count("started") == 1
    run.close()
    run.close()
    RunFolder.reopen(run.path, 0, "", tensorboard=False).close()


def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    RunLock(tmp_path).release()
    assert f"{tmp_path}: this file system has no locks (Function not implemented)" in caplog.text


def test_other_failures_of_a_lock_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ConfigError, match=r"cannot be locked for this job: Input/output error$"):
        RunLock(tmp_path)
