"""How a process ended is told alike by the kernel's answer to a pidfd and by /proc."""

import os
import select
import signal
import subprocess
import sys

import pytest

from moe_dist.launch import processes as module
from moe_dist.launch.processes import group_runs, wait_status, was_terminated

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
LEAVE = [sys.executable, "-c", "raise SystemExit(3)"]


@pytest.mark.parametrize("old_kernel", [False, True])
@pytest.mark.parametrize(
    ("command", "signum", "status"), [(SLEEP, signal.SIGKILL, 9), (SLEEP, signal.SIGTERM, 15), (LEAVE, None, 3 << 8)]
)
def test_a_zombie_tells_how_it_ended(
    command: list[str], signum: int | None, status: int, old_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if old_kernel:
        monkeypatch.setattr(module, "_GET_INFO", 0xC040FFFF)  # which no kernel knows
    with subprocess.Popen(command) as child:
        descriptor = os.pidfd_open(child.pid)
        if signum is not None:
            assert wait_status(descriptor, child.pid) is None  # while it runs
            child.send_signal(signum)
        assert select.select([descriptor], [], [], 60)[0]
        assert wait_status(descriptor, child.pid) == status
        child.wait(60)
    if old_kernel:
        assert wait_status(descriptor, child.pid) is None  # its parent has waited for it
    os.close(descriptor)


def test_only_sigterm_terminates() -> None:
    told = [was_terminated(status) for status in (None, 0, 3 << 8, int(signal.SIGKILL), int(signal.SIGTERM))]
    assert told == [False, False, False, False, True]


def test_a_group_of_zombies_does_not_run() -> None:
    with subprocess.Popen(SLEEP, start_new_session=True) as child:
        assert group_runs(child.pid)
        descriptor = os.pidfd_open(child.pid)
        child.kill()
        assert select.select([descriptor], [], [], 60)[0]
        assert not group_runs(child.pid)
        os.close(descriptor)
    assert not group_runs(child.pid)
